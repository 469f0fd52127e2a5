"""Relative representations: a sample by its similarities to anchors, the same in every latent space
that differs by a transformation which the similarity does not see."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.nn.checks import at_least_float32, check_features, check_sizes, full_precision
from weft.ops.pairwise.distance import pairwise_distance
from weft.ops.pairwise.pairwise import pairwise

METRICS = ("cosine", "euclidean", "l1", "linf")
AGGREGATIONS = ("concat", "sum", "mlp_sum")


class RelativeRepresentation(nn.Module):
    r"""Replaces a feature by its similarities, or distances, to anchors.

    .. math::
        r(x) = \big( s(x, a_1), \dots, s(x, a_K) \big)

    ===========  ==================================  ==============================================
    metric       s(x, a)                             unchanged when x and a are both
    ===========  ==================================  ==============================================
    cosine       cos(x, a), 0 for a zero vector      rotated, reflected; each scaled by any number
                                                     > 0
    euclidean    distance, of derivative 0 at 0      rotated, reflected, shifted
    l1, linf     the distances of those norms        permuted, with signs, and shifted
    ===========  ==================================  ==============================================

    A decoder trained on relative representations of one encoder works on those of another that
    encodes the same anchors ("zero-shot stitching").

    Args:
        anchors: ``(K, D)``, kept as a buffer; None if they come with each call, encoded by the same
            network as the samples, so that gradients flow through both.
        metric: cosine, euclidean, l1 or linf.

    Shapes: features ``(..., D)``, anchors ``(K, D)``, representations ``(..., K)`` in float32 or
    wider.

    Raises:
        ValueError: an unknown metric, shapes that do not match, anchors given twice or not at all.
        TypeError: features that are not floating-point.

    Source: Moschella et al., "Relative representations enable zero-shot latent space
    communication", ICLR 2023, section 3.
    """

    def __init__(self, anchors: Tensor | None = None, metric: str = "cosine"):
        super().__init__()
        check_metrics((metric,))
        if anchors is not None:
            check_anchors(anchors)
            anchors = anchors.detach().clone()
        self.metric = metric
        self.register_buffer("anchors", anchors)

    def forward(self, x: Tensor, anchors: Tensor | None = None) -> Tensor:
        return similarities(x, one_of(self.anchors, anchors), self.metric)

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}"


class InvarianceProduct(nn.Module):
    r"""Several relative representations at once, one for each metric, joined.

    Which transformation separates two latent spaces is not known beforehand; a product of
    representations with different invariances serves whichever it is.

    ===========  ================================================================================
    aggregation  joined representation
    ===========  ================================================================================
    concat       :math:`(r_1, \dots, r_M)`
    sum          :math:`\sum_m \mathrm{LayerNorm}_m(r_m)`
    mlp_sum      :math:`\sum_m \tanh(W_m \, \mathrm{LayerNorm}_m(r_m) + b_m)`
    ===========  ================================================================================

    Args:
        num_anchors: K.
        metrics: some of cosine, euclidean, l1 and linf, M of them.
        aggregation: concat, sum or mlp_sum.
        anchors: ``(K, D)`` or None, as in :class:`RelativeRepresentation`.
        device, dtype: of the parameters.

    Shapes: features ``(..., D)``; the result is ``(..., M K)`` for concat, else ``(..., K)``.

    Raises:
        ValueError: an unknown metric or aggregation, no or repeated metrics, shapes that do not
            match, anchors given twice or not at all.
        TypeError: features that are not floating-point.

    Source: Cannistraci et al., "From Bricks to Bridges: Product of Invariances to Enhance Latent
    Space Communication", ICLR 2024, section 3.
    """

    def __init__(
        self,
        num_anchors: int,
        metrics: Sequence[str] = METRICS,
        aggregation: str = "mlp_sum",
        *,
        anchors: Tensor | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(num_anchors=num_anchors)
        check_metrics(metrics)
        if aggregation not in AGGREGATIONS:
            raise ValueError(
                f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}"
            )
        if anchors is not None:
            check_anchors(anchors)
            if len(anchors) != num_anchors:
                raise ValueError(f"anchors must be ({num_anchors}, D), got {tuple(anchors.shape)}")
            anchors = anchors.detach().clone()
        self.num_anchors, self.metrics, self.aggregation = num_anchors, tuple(metrics), aggregation
        self.register_buffer("anchors", anchors)
        factory = {"device": device, "dtype": dtype}
        self.parts = nn.ModuleList()
        for _ in metrics:
            norm = nn.LayerNorm(num_anchors, **factory)
            if aggregation == "sum":
                self.parts.append(norm)
            if aggregation == "mlp_sum":
                linear = nn.Linear(num_anchors, num_anchors, **factory)
                self.parts.append(nn.Sequential(norm, linear, nn.Tanh()))

    def forward(self, x: Tensor, anchors: Tensor | None = None) -> Tensor:
        anchors = one_of(self.anchors, anchors)
        if len(anchors) != self.num_anchors:
            raise ValueError(f"anchors must be ({self.num_anchors}, D), got {tuple(anchors.shape)}")
        spaces = [similarities(x, anchors, metric) for metric in self.metrics]
        if self.aggregation == "concat":
            return torch.cat(spaces, -1)
        return sum(part(space) for part, space in zip(self.parts, spaces, strict=True))

    def extra_repr(self) -> str:
        return (
            f"num_anchors={self.num_anchors}, metrics={self.metrics}, "
            f"aggregation={self.aggregation!r}"
        )


def similarities(x: Tensor, anchors: Tensor, metric: str) -> Tensor:
    """``(..., D)``, ``(K, D)`` -> ``(..., K)``."""
    check_features("x", x, anchors.shape[1])
    with full_precision(x):
        dtype = torch.promote_types(at_least_float32(x).dtype, anchors.dtype)
        rows, anchors = x.reshape(-1, x.shape[-1]).to(dtype), anchors.to(dtype)
        if metric == "cosine":
            values = pairwise(rows, anchors, pair="cosine")
        elif metric == "linf":
            values = torch.cdist(rows, anchors, p=torch.inf)
        else:
            values = pairwise_distance(rows, anchors, metric)
    return values.view(*x.shape[:-1], len(anchors))


def check_metrics(metrics: Sequence[str]) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics must be different and at least one, got {tuple(metrics)}")


def check_anchors(anchors: Tensor) -> None:
    check_features("anchors", anchors)
    if anchors.dim() != 2 or not len(anchors):
        raise ValueError(f"anchors must be (K, D) with K >= 1, got {tuple(anchors.shape)}")


def one_of(kept: Tensor | None, given: Tensor | None) -> Tensor:
    if (kept is None) == (given is None):
        raise ValueError("anchors must be given once: to the layer or to the call")
    if kept is not None:
        return kept
    check_anchors(given)
    return given
