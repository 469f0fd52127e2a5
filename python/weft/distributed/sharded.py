"""Cross entropy over classes that are spread over ranks: only vectors over the samples travel.

lse_i = log Σ_r e^{lse_i^r},     t_i = Σ_r t_i^r,     loss_i = lse_i − t_i
"""

import torch
import torch.distributed as dist
from torch import Tensor

from weft.distributed.collectives import shard_sizes, sum_over_group


def log_sum_exp_over_group(lse: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """log Σ e^lse over ranks: each rank has the log-sum-exp of its own classes."""
    largest = lse.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    shift = torch.where(largest == -torch.inf, 0, largest)
    total = sum_over_group((lse - shift).exp(), group)
    return shift + total.log()


def mean_or_sum(losses: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """Of the losses that count; the mean of none is NaN with gradient 0."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = counts.sum()
    nothing = torch.where(count == 0, torch.nan, 0.0).to(losses.dtype)
    return losses.sum() / count.clamp(min=1) + nothing


def sharded_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``F.cross_entropy`` of logits whose classes are spread over the ranks of a group.

    For heads of any kind::

        x = copy_to_group(x, group)          # the same on all ranks
        logits = weft.subspace_logits(x, bases_of_this_rank, gamma=25.0)
        loss = sharded_cross_entropy(logits, target, group)

    Args:
        logits: ``(N, C_r)``: of the classes of this rank, which follow those of the ranks before.
        target: ``(N,)`` int64 in [0, Σ C_r), the same on all ranks.
        ignore_index, label_smoothing, reduction: as in ``F.cross_entropy``.

    Returns:
        The loss over all classes, the same on all ranks. The gradient of the logits is that of this
        rank's columns of the whole matrix.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (N, C_r) and target (N,), got {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    first, classes = place_of_shard(logits.shape[1], logits.device, group)
    counts = target != ignore_index
    s = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    own, column = own_targets(target, first, s.shape[1])
    wide = torch.cat([s, s.new_zeros(s.shape[0], 1)], 1)  # a shard may have no class
    of_target = wide.gather(1, column[:, None]).squeeze(1)
    of_target = torch.where(own, (1 - label_smoothing) * of_target, 0)
    if label_smoothing:
        of_target = of_target + label_smoothing / classes * s.sum(1)
    lse = s.logsumexp(1) if s.shape[1] else s.sum(1) - torch.inf
    losses = log_sum_exp_over_group(lse, group) - sum_over_group(of_target, group)
    return mean_or_sum(torch.where(counts, losses, 0), counts, reduction)


def place_of_shard(size: int, device: torch.device, group) -> tuple[int, int]:
    """The first class of this rank, and the number of all."""
    sizes = shard_sizes(size, device, group)
    return sum(sizes[: dist.get_rank(group)]), sum(sizes)


def own_targets(target: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Whether a target is among the classes of this rank, and its column there, or ``size``."""
    own = (target >= first) & (target < first + size)
    return own, torch.where(own, target - first, size)
