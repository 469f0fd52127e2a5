"""Matrices with equal row sums and equal column sums, by a fixed number of normalisations.

stabilizer s = 0:  log Q <- x / epsilon, then alternately log Q <- log Q − log Σ_line Q, and at the
end Q <- exp(log Q), lines of the last axis summing to 1. What the lines of the other axis are set
to (N/M or M/N) cancels.

s > 0:  Q <- a softmax(x / epsilon) + s along the first axis, then Q <- a' Q / (Σ_line Q + s) in
turn: a is the sum of the first axis's lines, a' of those being normalised, 1 for the last axis.
"""

import torch
from torch import Tensor

from weft.reference.pairwise.subspace_logits import upcast


def axes(iterations: int, last_rows: bool) -> list[int]:
    """The dimensions that are summed over, in order."""
    return iterations * ([-2, -1] if last_rows else [-1, -2])


def first_sum(scores: Tensor, last_rows: bool) -> float:
    """What lines of the first axis sum to, so that the others sum to 1."""
    N, M = scores.shape[-2:]
    return N / M if last_rows else M / N


def log_normalized(x: Tensor, dim: int) -> Tensor:
    """x − log Σ exp x; a line of −inf stays one."""
    dead = (x == -torch.inf).all(dim, keepdim=True)
    total = x.masked_fill(dead, 0).logsumexp(dim, keepdim=True)
    return x - total.masked_fill(dead, 0)


def stages(
    scores: Tensor, epsilon: float, iterations: int, last_rows: bool, stabilizer: float
) -> list[Tensor]:
    """What each normalisation makes: log Q, or Q itself with a stabilizer."""
    x = scores / epsilon
    first, *others = axes(iterations, last_rows)
    x = log_normalized(x, first)
    found = [x]
    if not stabilizer:
        for dim in others:
            found.append(log_normalized(found[-1], dim))
        return found
    size = first_sum(scores, last_rows)
    found = [size * x.exp() + stabilizer]
    for dim in others:
        target = size if dim == first else 1.0
        found.append(target * found[-1] / (found[-1].sum(dim, keepdim=True) + stabilizer))
    return found


def doubly_stochastic(
    scores: Tensor, epsilon: float, iterations: int, last_rows: bool, stabilizer: float
) -> Tensor:
    """(..., N, M) -> (..., N, M), half precision in float32."""
    if not scores.numel():
        return 1 * scores
    (x,) = upcast(scores)
    last = stages(x, epsilon, iterations, last_rows, stabilizer)[-1]
    return (last if stabilizer else last.exp()).to(scores.dtype)


def doubly_stochastic_backward(
    grad: Tensor,
    scores: Tensor,
    epsilon: float,
    iterations: int,
    last_rows: bool,
    stabilizer: float,
) -> Tensor:
    """Back through every normalisation of the forward, the last one first.

    ∂(log Q) = h − P Σ_line h for log Q <- log Q − log Σ_line Q with the result P;
    ∂Q = (a / (Σ_line Q + s)) (h − Σ_line h Q' / a) for Q' = a Q / (Σ_line Q + s).
    """
    if not scores.numel():
        return 1 * grad
    grad, x = upcast(grad, scores)
    found = stages(x, epsilon, iterations, last_rows, stabilizer)
    dims = axes(iterations, last_rows)
    if not stabilizer:
        grad = grad * found[-1].exp()
        for dim, log in zip(reversed(dims), reversed(found), strict=True):
            grad = grad - log.exp() * grad.sum(dim, keepdim=True)
        return (grad / epsilon).to(scores.dtype)
    size = first_sum(scores, last_rows)
    for stage in range(len(dims) - 1, 0, -1):
        dim, before, after = dims[stage], found[stage - 1], found[stage]
        target = size if dim == dims[0] else 1.0
        inner = (grad * after).sum(dim, keepdim=True) / target
        grad = target * (grad - inner) / (before.sum(dim, keepdim=True) + stabilizer)
    share = log_normalized(x / epsilon, dims[0]).exp()
    inner = (grad * share).sum(dims[0], keepdim=True)
    return (size * share * (grad - inner) / epsilon).to(scores.dtype)
