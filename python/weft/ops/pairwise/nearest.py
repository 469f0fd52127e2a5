"""Nearest neighbours: the k best pairs of each row, by any pair function."""

from typing import NamedTuple

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.pairwise.masks import SCHEMA as MASK_SCHEMA
from weft.ops.pairwise.masks import PairMask, mask_of
from weft.ops.pairwise.pairs import SCHEMA, Operands, pair_of
from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.reference.pairwise import nearest as formula
from weft.reference.pairwise.pairs import Pair

SIMILARITIES = ("dot", "cosine", "rbf", "log")


class Nearest(NamedTuple):
    values: Tensor
    indices: Tensor


def nearest(
    x: Tensor,
    y: Tensor,
    k: int = 1,
    metric: str = "sqeuclidean",
    mask: Tensor | PairMask | None = None,
    largest: bool | None = None,
    *,
    scale: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    curvature: float = 1.0,
    precision: Tensor | None = None,
    bias: Tensor | None = None,
) -> Nearest:
    r"""The k rows of y that are nearest to each row of x, and how near they are.

    .. math::
        \text{indices}_{i} = \text{the first } k \text{ columns } j \text{ in the order of }
        s_{ij}, \qquad \text{values}_{ir} = s_{i, \text{indices}_{ir}}

    Exact: candidates from products are compared again by differences in float64, so the indices are
    those of a search in float64. Ties go to the lowest index, also those of repeated points. A NaN
    comes before every number, as in ``torch.min``. The matrix of all pairs is never stored.

    Args:
        x: queries, ``(N, D)``, any strides.
        y: the rows searched, ``(M, D)``, any strides.
        k: how many, >= 1; it may exceed M.
        metric: dot, cosine, sqeuclidean, euclidean, l1, rbf, log, mahalanobis, poincare or lorentz,
            as in ``weft.pairwise_distance``.
        mask: the pairs allowed: ``(N, M)`` bool of any strides, True where a pair is, or a
            ``weft.PairMask`` (labels, all but the diagonal); None allows all. What is not allowed
            is never read into a result.
        largest: the k largest values rather than the smallest; None takes what is nearer: the
            largest for the similarities dot, cosine, rbf and log, the smallest for distances.
        scale: factor of dot and cosine.
        gamma: of rbf, > 0.
        eps: of log, > 0.
        curvature: of poincare and lorentz, > 0.
        precision: of mahalanobis, ``(D, D)`` positive definite.
        bias: ``(M,)``, added to dot and cosine.

    Returns:
        A named tuple: ``values`` ``(N, k)`` in the dtype of x, computed by differences for the
        chosen pairs and sorted from near to far, differentiable twice in x, y, ``precision`` and
        ``bias``; ``indices`` ``(N, k)`` int64. A row with fewer than k allowed columns ends in
        indices of -1 with values of infinity (-infinity for the largest) that have no gradient.
        float64, float32, bfloat16 or float16.

    Raises:
        ValueError: shapes or devices that do not match, k < 1, an unknown metric, parameters out of
            range.
        TypeError: dtypes that differ or are not supported, a mask that is not bool.

    Source: Johnson et al., "Billion-scale similarity search with GPUs", IEEE Transactions on Big
    Data 2019, section 4 (brute force with selection); as codebook search: van den Oord et al.,
    "Neural Discrete Representation Learning", NeurIPS 2017, equation 1.
    """
    operands = pair_of(
        metric,
        x,
        y,
        scale=scale,
        gamma=gamma,
        eps=eps,
        curvature=curvature,
        precision=precision,
        bias=bias,
    )
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if largest is None:
        largest = metric in SIMILARITIES
    return Nearest(*select(operands, mask_of(mask, x, y), k, bool(largest)))


def select(operands: Operands, mask: PairMask, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Values and indices, (N, k), of the k largest or smallest pairs of each row."""
    o = operands
    if transformed():
        factors = (o.row_factor, o.column_factor, o.bias)
        return formula.nearest(o.x, o.y, o.pair, *factors, mask.arguments(), k, largest)
    return forward(*wide_tensors(o), *mask.arguments(), k, largest)


def wide_tensors(operands: Operands) -> tuple:
    """The arguments of ``SCHEMA`` with factors and bias in the dtype of sums."""
    x, y, *factors, base, function, scale, shift, parameter = operands.arguments()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    factors = [None if t is None else t.to(wide) for t in factors]
    return (x, y, *factors, base, function, scale, shift, parameter)


def _fake(x, y, row_factor, column_factor, bias, *rest):
    k = rest[-2]
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _reference(x, y, row_factor, column_factor, bias, *rest):
    pair, mask, (k, largest) = rest[:5], rest[5:10], rest[10:]
    factors = (row_factor, column_factor, bias)
    values, indices = formula.nearest(x, y, Pair(*pair), *factors, mask, k, largest)
    return values.contiguous(), indices.contiguous()


def _fake_backward(grad, x, y, row_factor, column_factor, bias, *rest):
    tensors = (x, y, row_factor, column_factor, bias)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


def _formula_backward(grad, x, y, row_factor, column_factor, bias, *rest):
    *pair, indices = rest
    factors = (row_factor, column_factor, bias)
    grads = formula.nearest_backward(grad, x, y, *factors, Pair(*pair), indices)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _reference_backward(*args):
    return tuple(g.contiguous() for g in _formula_backward(*args))


def _refuses_on_triton(*args) -> str | None:
    """A row's candidates stay in registers, and a column's number has 31 bits."""
    y, k = args[1], args[-2]
    if k > 32:
        return f"keeps at most 32 neighbours of a row, not {k}"
    return "takes less than 2^31 rows of y" if y.shape[0] >= 2**31 else None


forward = Op(
    "pairwise_select",
    f"({SCHEMA}, {MASK_SCHEMA}, SymInt k, bool largest) -> (Tensor values, Tensor indices)",
    family="pairwise",
    fake=_fake,
    implementations=[
        cpu("pairwise_select"),
        triton("pairwise.nearest", "pairwise_select", _refuses_on_triton),
        reference(_reference),
    ],
)
backward = Op(
    "pairwise_select_backward",
    f"(Tensor grad, {SCHEMA}, Tensor indices) -> (Tensor grad_x, Tensor grad_y, "
    "Tensor grad_row_factor, Tensor grad_column_factor, Tensor grad_bias)",
    family="pairwise",
    fake=_fake_backward,
    implementations=[
        cpu("pairwise_select_backward"),
        triton("pairwise.nearest_backward", "pairwise_select_backward"),
        reference(_reference_backward),
    ],
)


def _setup(ctx, inputs, output):
    indices = output[1]
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(*inputs[:5], indices)
    ctx.pair = inputs[5:10]


def _gradient(ctx, grad, _):
    *tensors, indices = ctx.saved_tensors
    grads = backward(grad, *tensors, *ctx.pair, indices)
    grads = [g if t is not None else None for g, t in zip(grads, tensors, strict=True)]
    return *grads, *[None] * 12


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(backward, _formula_backward, arguments=[0, 1, 2, 3, 4, 5])
