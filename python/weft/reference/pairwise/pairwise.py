"""Dense reductions of the pairs of rows that a mask allows:

sum        out_i = Σ_j s_ij      or      Σ_j s_ij values_j
logsumexp  out_i = log Σ_j exp s_ij,     −∞ where no pair counts

Results are in the dtype of sums: float32 beside half precision. The backward is that of all dense
reductions (weft.reference.pairwise.gradients), with weights
sum        w_ij = grad_i      or      ⟨grad_i, values_j⟩
logsumexp  w_ij = grad_i exp(s_ij − out_i),     0 where out_i = −∞
"""

import torch
from torch import Tensor

from weft.reference.pairwise.gradients import pair_gradients, weighted_sums
from weft.reference.pairwise.masks import mask_values
from weft.reference.pairwise.pairs import Pair, pair_values


def pairwise_sum(
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
    pair: Pair,
    mask: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    """(N,), or (N, E) with values (M, E)."""
    s = mask_values(pair_values(x, y, pair, row_factor, column_factor, bias), mask, 0)
    return s.sum(1) if values is None else weighted_sums(s, values, mask)


def pairwise_sum_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
    pair: Pair,
    mask: Tensor | None,
    values: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if values is None:
        weights = grad[:, None].expand(x.shape[0], y.shape[0])
    else:
        weights = mask_values(grad @ values.mT, mask, 0)
    return pair_gradients(weights, x, y, row_factor, column_factor, bias, pair, mask)


def pairwise_logsumexp(
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
    pair: Pair,
    mask: Tensor | None,
) -> Tensor:
    s = mask_values(pair_values(x, y, pair, row_factor, column_factor, bias), mask, -torch.inf)
    if not y.shape[0]:
        return s.sum(1) - torch.inf
    empty = (s == -torch.inf).all(1)  # of these PyTorch's gradient is NaN
    return s.masked_fill(empty[:, None], 0).logsumexp(1).masked_fill(empty, -torch.inf)


def pairwise_logsumexp_backward(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
    pair: Pair,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    s = mask_values(pair_values(x, y, pair, row_factor, column_factor, bias), mask, -torch.inf)
    empty = out == -torch.inf
    weights = grad[:, None] * (s - out.masked_fill(empty, 0)[:, None]).exp()
    weights = weights.masked_fill(empty[:, None], 0)
    return pair_gradients(weights, x, y, row_factor, column_factor, bias, pair, mask)
