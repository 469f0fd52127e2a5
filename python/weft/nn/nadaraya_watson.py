"""A classifier without parameters: class probabilities as weighted votes of a support set."""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.nn.checks import (
    at_least_float32,
    check_features,
    check_labels,
    check_sizes,
    full_precision,
)
from weft.ops.pairwise.distance import pairwise_distance
from weft.ops.pairwise.pairwise import pairwise
from weft.ops.pairwise.unit_rows import unit_rows

METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")


class NadarayaWatsonHead(nn.Module):
    r"""Each support sample votes for its class, with a weight that falls with its distance.

    .. math::
        p(c \mid x) = \sum_{i : y_i = c} w_i(x), \qquad
        w(x) = \mathrm{softmax}_i \big( {-d(x, s_i)} / \tau \big), \qquad
        \text{out}_c = \log (p(c \mid x) + \epsilon)

    d is the distance (euclidean), its square (sqeuclidean), or minus the similarity (cosine, dot).
    The class of a decision can be traced to support samples, and what the support lacks cannot be
    used: a support drawn from one environment at a time makes the features invariant to it.

    The N x M matrix of weights is never stored: the votes of dot and cosine are reduced in cache,
    distances are formed for one class of the support at a time and again in the backward.

    Args:
        num_classes: C.
        metric: euclidean (the paper), sqeuclidean, cosine or dot.
        temperature: :math:`\tau` > 0.
        eps: epsilon >= 0, which bounds the loss of a class without support; as published 1e-12.

    Shapes: features ``(..., D)``, support ``(M, D)`` with M >= 1, its labels ``(M,)`` int64;
    the result is ``(..., C)`` log-probabilities, for ``torch.nn.NLLLoss``, in float32 or wider.

    Raises:
        ValueError: sizes or numbers out of range, an unknown metric, shapes that do not match,
            labels outside the classes.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Wang et al., "Learning Invariant Representations with a Nonparametric Nadaraya-Watson
    Head", NeurIPS 2023, section 3.
    """

    def __init__(
        self,
        num_classes: int,
        metric: str = "euclidean",
        *,
        temperature: float = 1.0,
        eps: float = 1e-12,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes)
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if not eps >= 0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        self.num_classes, self.metric = num_classes, metric
        self.temperature, self.eps = float(temperature), float(eps)

    def forward(self, x: Tensor, support: Tensor, support_labels: Tensor) -> Tensor:
        check_features("support", support)
        if support.dim() != 2 or not len(support):
            raise ValueError(f"support must be (M, D) with M >= 1, got {tuple(support.shape)}")
        check_features("x", x, support.shape[1])
        check_labels("support_labels", support_labels, (len(support),), self.num_classes)
        with full_precision(x):
            wide = at_least_float32(x)
            dtype = torch.promote_types(wide.dtype, at_least_float32(support).dtype)
            rows, support = wide.reshape(-1, x.shape[-1]).to(dtype), support.to(dtype)
            if self.metric == "cosine":
                rows, support = unit_rows(rows), unit_rows(support)
            order = support_labels.argsort(stable=True)
            counts = torch.bincount(support_labels, minlength=self.num_classes).tolist()
            votes = [
                self._votes(rows, own) if len(own) else rows.new_full((len(rows),), -torch.inf)
                for own in support[order].split(counts)
            ]
            log_probabilities = torch.stack(votes, 1).log_softmax(1)
            if self.eps:
                floor = log_probabilities.new_tensor(math.log(self.eps))
                log_probabilities = torch.logaddexp(log_probabilities, floor)
        return log_probabilities.view(*x.shape[:-1], self.num_classes)

    def _votes(self, x: Tensor, support: Tensor) -> Tensor:
        """The logarithm of the summed weights, before they are normalised, of one class."""
        if self.metric in ("dot", "cosine"):
            scale = 1 / self.temperature
            return pairwise(x, support, pair="dot", reduce="logsumexp", scale=scale)
        return checkpoint(self._distance_votes, x, support, use_reentrant=False)

    def _distance_votes(self, x: Tensor, support: Tensor) -> Tensor:
        scores = -pairwise_distance(x, support, self.metric)
        return (scores / self.temperature).logsumexp(1)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, metric={self.metric!r}, "
            f"temperature={self.temperature}"
        )
