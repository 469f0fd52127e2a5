"""Assignments of samples that are spread over ranks: only vectors over the columns travel.

The columns are first shifted by their largest entry of all ranks, the rows by their largest after
the first normalisation of the columns. From then on every sum is in [1/M, N] by itself: where rows
sum to 1, no column is more than N, so what it is multiplied with is at least 1/M of its target, and
no row that it is part of loses more.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from weft.reference.pairwise.subspace_logits import upcast


def over_group(scores: Tensor, iterations: int, epsilon: float, group: dist.ProcessGroup) -> Tensor:
    """The rows of this rank of ``doubly_stochastic(..., last="rows")`` of the rows of all."""
    if scores.requires_grad and torch.is_grad_enabled():
        raise ValueError("scores: assignments over a group have no gradient; detach them")
    with torch.no_grad():
        (x,) = upcast(scores)
        x = x / epsilon
        largest = x.amax(-2) if x.shape[-2] else x.new_full(x.sum(-2).shape, -torch.inf)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        x = x - _finite(largest)[..., None, :]
        sums = x.exp().sum(-2)
        dist.all_reduce(sums, group=group)
        x = x - _finite(sums.log())[..., None, :]
        x = x - _finite(x.logsumexp(-1, keepdim=True))
        for _ in range(iterations - 1):
            sums = x.exp().sum(-2)
            dist.all_reduce(sums, group=group)
            x = x - _finite(sums.log())[..., None, :]
            x = x - _finite(x.exp().sum(-1, keepdim=True).log())
        return x.exp().to(scores.dtype)


def _finite(shift: Tensor) -> Tensor:
    """No shift for a line that is all −inf."""
    return shift.masked_fill(shift == -torch.inf, 0)
