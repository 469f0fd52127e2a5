"""Conditional transport on a matrix of similarities s, both navigators.

To columns, with weights b:   π_ij = b_j exp(s_ij/τ) / Σ_k b_k exp(s_ik/τ),   r_i = Σ_j π_ij s_ij
To rows, with weights a:      κ_ij = a_i exp(s_ij/τ) / Σ_k a_k exp(s_kj/τ),   c_j = Σ_i κ_ij s_ij

Both are computed from the largest similarity h that takes part: exp((s − h)/τ + log w) neither
overflows nor vanishes at any temperature, and r = h + Σ π (s − h) cancels little.
"""

import torch
from torch import Tensor

LARGEST_INVERSE = 1e20  # of a temperature: beyond, a navigator is the limit in any dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32 of half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_of(temperature: Tensor) -> Tensor:
    return temperature.reciprocal().clamp(max=LARGEST_INVERSE)


def expectation(s: Tensor, log_weights: Tensor | None, inverse: Tensor, dim: int):
    """(mean, largest, log Σ exp((s − largest)/τ + log weight)) along a dimension of (B, N, M).

    Where no point has a weight the mean, the largest and the logarithm are 0.
    """
    shape = s.shape[:dim] + s.shape[dim + 1 :]
    if s.shape[dim] == 0:
        return s.new_zeros(shape), s.new_zeros(shape), s.new_zeros(shape)
    logs = s.new_zeros(()) if log_weights is None else log_weights.unsqueeze(3 - dim)
    largest = torch.where(logs == -torch.inf, -torch.inf, s.detach()).amax(dim, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0, largest)
    d = s - largest
    e = torch.exp(d * inverse + logs)
    total = e.sum(dim)
    total = torch.where(total == 0, 1, total)
    largest = largest.squeeze(dim)
    mean = largest + (e * d).sum(dim) / total
    return torch.where(e.sum(dim) == 0, 0, mean), largest, total.log()


def conditional_transport(
    similarity: Tensor, log_a: Tensor | None, log_b: Tensor | None, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r (B, N), c (B, M), (h, log Σ) of rows (2, B, N), (h, log Σ) of columns (2, B, M))."""
    s, inverse = similarity.to(wide(similarity.dtype)), inverse_of(temperature)
    row_mean, *row_stats = expectation(s, log_b, inverse, 2)
    column_mean, *column_stats = expectation(s, log_a, inverse, 1)
    return row_mean, column_mean, torch.stack(row_stats), torch.stack(column_stats)


def plan(s: Tensor, log_weights: Tensor | None, temperature: Tensor, dim: int) -> Tensor:
    """π (dim 2) or κ (dim 1), (B, N, M); 0 where no point has a weight."""
    s, inverse = s.to(wide(s.dtype)), inverse_of(temperature)
    _, largest, log_total = expectation(s.detach(), log_weights, inverse, dim)
    largest, log_total = largest.unsqueeze(dim), log_total.detach().unsqueeze(dim)
    logs = s.new_zeros(()) if log_weights is None else log_weights.unsqueeze(3 - dim)
    e = torch.exp((s - largest) * inverse + (logs - log_total))
    total = e.sum(dim, keepdim=True)  # 1 but for rounding; the gradient comes through it
    return e / torch.where(total == 0, 1, total)


def conditional_transport_backward(
    similarity: Tensor,
    grad_row: Tensor,
    grad_column: Tensor,
    log_a: Tensor | None,
    log_b: Tensor | None,
    temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With p = ∂r_i π_ij, q = ∂c_j κ_ij, u = s − r_i, v = s − c_j:

    ∂s = p (1 + u/τ) + q (1 + v/τ),   ∂log b_j = Σ_i p u,   ∂log a_i = Σ_j q v,
    ∂τ = −Σ (p u² + q v²)/τ²
    """
    s, inverse = similarity.to(wide(similarity.dtype)), inverse_of(temperature)
    grads = []
    for dim, grad, logs in ((2, grad_row, log_b), (1, grad_column, log_a)):
        mean = expectation(s, logs, inverse, dim)[0].unsqueeze(dim)
        p = grad.unsqueeze(dim) * plan(s, logs, temperature, dim)
        u = s - mean
        pu = p * u
        grads.append((p + pu * inverse, pu.sum(3 - dim), (pu * u).sum()))
    (of_rows, grad_b, bend_b), (of_columns, grad_a, bend_a) = grads
    grad_temperature = -((bend_a + bend_b) * inverse) * inverse
    return (
        (of_rows + of_columns).to(similarity.dtype),
        s.new_empty(0) if log_a is None else grad_a,
        s.new_empty(0) if log_b is None else grad_b,
        grad_temperature.reshape(temperature.shape),
    )
