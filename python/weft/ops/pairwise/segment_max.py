"""Maxima over segments of rows: late interaction of token embeddings, prototypes of image parts."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.checks import autocast, check_float, values_are_checked
from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.reference.pairwise import segment_max as formula

PADS = ("neg_inf", "zero")
ACTIVATIONS = ("log", "linear", "rbf")


def maxsim(
    queries: Tensor,
    documents: Tensor,
    query_lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    pad: str = "neg_inf",
    *,
    document_offsets: Tensor | None = None,
) -> Tensor:
    r"""Late interaction: each token of a query takes its best token of the document.

    .. math::
        \text{out}_{qn} = \sum_{i < \text{query\_lengths}_q} \;
            \max_{j < \text{document\_lengths}_n} \langle q_{qi}, d_{nj} \rangle

    Tokens behind a length are padding and are never read, whatever they hold. Published code means
    one of two things by it, so it has to be said: with ``pad="neg_inf"`` padding takes no part in
    the maximum; with ``pad="zero"`` a document that is shorter than ``Ld`` has similarity 0 with
    every token of the query too, as where padding is multiplied by 0, so that its maximum is at
    least 0.

    Args:
        queries: ``(Q, Lq, D)``, any strides.
        documents: ``(N, Ld, D)``, any strides; with ``document_offsets`` all tokens of all
            documents one after the other, ``(T, D)``.
        query_lengths: ``(Q,)`` int64 in ``[0, Lq]``; None means Lq.
        document_lengths: ``(N,)`` int64 in ``[0, Ld]``; None means Ld.
        pad: neg_inf or zero.
        document_offsets: ``(N + 1,)`` int64 from 0 to T, not falling: document n is
            ``documents[offsets[n]:offsets[n + 1]]``. There is no padding then.

    Returns:
        ``(Q, N)``, contiguous, in the dtype of queries: float64, float32, bfloat16 or float16, the
        same as documents; half precision accumulates in float32. A query without tokens has 0; an
        empty document -infinity (0 with ``pad="zero"``). Differentiable twice in queries and
        documents; of equal tokens the first of the document gets the gradient. A NaN propagates.

    Raises:
        ValueError: shapes, devices, lengths or offsets out of range, an unknown ``pad``, ``"zero"``
            or lengths together with offsets.
        TypeError: dtypes that differ or are not supported.

    Source: Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized
    Late Interaction over BERT", SIGIR 2020, equation 3.
    """
    queries, documents = autocast(queries, documents)
    check_float(queries=queries, documents=documents)
    if queries.dim() != 3:
        raise ValueError(f"queries must be (Q, Lq, D), got {tuple(queries.shape)}")
    Q, Lq, D = queries.shape
    packed = document_offsets is not None
    if documents.dim() != 3 - packed or documents.shape[-1] != D:
        expected = "(T, D)" if packed else "(N, Ld, D)"
        raise ValueError(f"documents must be {expected} with D = {D}, got {tuple(documents.shape)}")
    if pad not in PADS:
        raise ValueError(f"pad must be one of {', '.join(PADS)}, got {pad!r}")
    if packed and (pad == "zero" or document_lengths is not None):
        raise ValueError("document_offsets leave no padding: without lengths and pad='zero'")
    _check_lengths("query_lengths", query_lengths, Q, Lq, queries)
    if packed:
        _check_offsets(document_offsets, documents)
    else:
        _check_lengths("document_lengths", document_lengths, *documents.shape[:2], queries)
    if query_lengths is not None:  # padding is not read
        used = torch.arange(Lq, device=queries.device) < query_lengths[:, None]
        queries = torch.where(used[..., None], queries, 0)
    values, _ = segment_max(
        documents, queries.flatten(0, 1), document_lengths, document_offsets, "dot"
    )
    if pad == "zero" and document_lengths is not None:
        padding = document_lengths[:, None] < documents.shape[1]
        values = torch.where(padding & (values < 0), 0, values)
    return formula.maxsim(values, Q, query_lengths).to(queries.dtype)


class PrototypeSimilarity(NamedTuple):
    similarities: Tensor
    positions: Tensor


def prototype_similarity(
    features: Tensor,
    prototypes: Tensor,
    activation: str = "log",
    pool: str = "max",
    *,
    eps: float = 1e-4,
    gamma: float = 1.0,
) -> PrototypeSimilarity:
    r"""How much the most similar place of a feature map looks like each prototype.

    .. math::
        d_{bp} = \min_{hw} \lVert f_{b,:,hw} - p_p \rVert^2, \qquad
        \text{sim}_{bp} = \log \frac{d_{bp} + 1}{d_{bp} + \text{eps}}
        \text{ (log)}, \quad -d_{bp} \text{ (linear)}, \quad e^{-\text{gamma}\, d_{bp}}
        \text{ (rbf)}

    Each activation falls with the distance, so its maximum over the places is that of the least
    distance. Distances are computed by differences: nothing cancels far from the origin. The map
    of all distances, B x P x H x W, is never stored.

    Args:
        features: ``(B, D, H, W)``, any strides (channels first or last).
        prototypes: ``(P, D)``, any strides.
        activation: log, linear or rbf.
        pool: max, the only one.
        eps: of log, > 0.
        gamma: of rbf, > 0.

    Returns:
        A named tuple: ``similarities`` ``(B, P)`` in the dtype of features, float64, float32,
        bfloat16 or float16, differentiable twice in both inputs; ``positions`` ``(B, P)`` int64,
        ``h * W + w`` of the first place with the least distance. Without places (``H * W = 0``)
        the distance is infinite and the position -1. A NaN propagates.

    Raises:
        ValueError: shapes or devices that do not match, an unknown activation or pool, parameters
            out of range.
        TypeError: dtypes that differ or are not supported.

    Source: Chen et al., "This Looks Like That: Deep Learning for Interpretable Image Recognition",
    NeurIPS 2019, section 2.1.
    """
    features, prototypes = autocast(features, prototypes)
    check_float(features=features, prototypes=prototypes)
    if features.dim() != 4:
        raise ValueError(f"features must be (B, D, H, W), got {tuple(features.shape)}")
    D = features.shape[1]
    if prototypes.dim() != 2 or prototypes.shape[1] != D:
        raise ValueError(f"prototypes must be (P, D) with D = {D}, got {tuple(prototypes.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if pool != "max":
        raise ValueError(f"pool must be max, got {pool!r}")
    for name, value in (("eps", eps), ("gamma", gamma)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    rows = features.flatten(2).mT  # (B, H·W, D), a view
    values, positions = segment_max(rows, prototypes, None, None, "sqeuclidean")
    if activation == "log":
        values = ((1 - values) / (eps - values)).log()
        if not features.shape[2] * features.shape[3]:
            values = torch.zeros_like(values)  # the limit; ∞ / ∞ is none
    elif activation == "rbf":
        values = (gamma * values).exp()
    return PrototypeSimilarity(values.to(features.dtype), positions)


def _check_lengths(name: str, lengths: Tensor | None, count: int, most: int, like: Tensor) -> None:
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        raise TypeError(
            f"{name} must be an int64 tensor, got {getattr(lengths, 'dtype', type(lengths))}"
        )
    if lengths.shape != (count,) or lengths.device != like.device:
        raise ValueError(
            f"{name} must be ({count},) on {like.device}, "
            f"got {tuple(lengths.shape)} on {lengths.device}"
        )
    if values_are_checked(lengths) and count and not 0 <= lengths.min() <= lengths.max() <= most:
        raise ValueError(
            f"{name} must be in [0, {most}], got {int(lengths.min())} to {int(lengths.max())}"
        )


def _check_offsets(offsets: Tensor, documents: Tensor) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
        raise TypeError(
            f"document_offsets must be an int64 tensor, got "
            f"{getattr(offsets, 'dtype', type(offsets))}"
        )
    if offsets.dim() != 1 or not offsets.numel() or offsets.device != documents.device:
        raise ValueError(
            f"document_offsets must be (N + 1,) on {documents.device}, "
            f"got {tuple(offsets.shape)} on {offsets.device}"
        )
    if values_are_checked(offsets):
        ends = (int(offsets[0]), int(offsets[-1]))
        if ends != (0, documents.shape[0]) or (offsets.diff() < 0).any():
            raise ValueError(
                f"document_offsets must rise from 0 to {documents.shape[0]}, got {ends[0]} to "
                f"{ends[1]}{', with a fall' if (offsets.diff() < 0).any() else ''}"
            )


def segment_max(
    x: Tensor, y: Tensor, lengths: Tensor | None, offsets: Tensor | None, base: str
) -> tuple[Tensor, Tensor]:
    """Values in the dtype of sums and indices, (S, M)."""
    if transformed():
        return formula.segment_max(x, y, lengths, offsets, base)
    contiguous = lambda t: None if t is None else t.contiguous()  # noqa: E731
    return forward(x, y, contiguous(lengths), contiguous(offsets), base)


def _fake(x, y, lengths, offsets, base):
    S = x.shape[0] if offsets is None else offsets.shape[0] - 1
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.new_empty(S, y.shape[0], dtype=wide)
    return values, x.new_empty(S, y.shape[0], dtype=torch.int64)


def _reference(x, y, lengths, offsets, base):
    values, indices = formula.segment_max(x, y, lengths, offsets, base)
    return values.contiguous(), indices.contiguous()


def _fake_backward(grad, x, y, indices, offsets, base):
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _reference_backward(*args):
    return tuple(g.contiguous() for g in formula.segment_max_backward(*args))


forward = Op(
    "segment_max",
    "(Tensor x, Tensor y, Tensor? lengths, Tensor? offsets, str base) "
    "-> (Tensor values, Tensor indices)",
    family="pairwise",
    fake=_fake,
    implementations=[
        cpu("segment_max"),
        triton("pairwise.segment_max", "segment_max"),
        reference(_reference),
    ],
)
backward = Op(
    "segment_max_backward",
    "(Tensor grad, Tensor x, Tensor y, Tensor indices, Tensor? offsets, str base) "
    "-> (Tensor grad_x, Tensor grad_y)",
    family="pairwise",
    fake=_fake_backward,
    implementations=[
        cpu("segment_max_backward"),
        triton("pairwise.segment_max", "segment_max_backward"),
        reference(_reference_backward),
    ],
)


def _setup(ctx, inputs, output):
    x, y, _, offsets, ctx.base = inputs
    indices = output[1]
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, y, indices, offsets)


def _gradient(ctx, grad, _):
    return *backward(grad, *ctx.saved_tensors, ctx.base), None, None, None


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(backward, formula.segment_max_backward, arguments=[0, 1, 2])
