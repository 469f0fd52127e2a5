"""The contrastive loss with the rows of all ranks of a process group as columns, block by block."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from weft.distributed import gather, ring_sums, shard_sizes
from weft.ops.pairwise.targets import Targets, occurrences, shares


@dataclass(frozen=True)
class GroupTargets:
    """The targets of this rank's rows in the block of columns of each rank."""

    local: Targets  # shares are of the columns of all ranks
    all_labels: Tensor | None  # of the columns of all ranks
    all_column_shares: Tensor | None
    columns: int  # of a block
    rank: int

    def block(self, owner: int) -> Targets:
        part = slice(owner * self.columns, (owner + 1) * self.columns)
        of = replace(self.local, exclude_diagonal=self.local.exclude_diagonal and self.home(owner))
        if self.all_labels is not None:
            of = replace(of, column_labels=self.all_labels[part])
        elif not self.home(owner):
            of = replace(of, target=torch.full_like(of.target, -1))
        if self.all_column_shares is not None:
            of = replace(of, column_share=self.all_column_shares[part])
        return of

    def home(self, owner: int) -> bool:
        return owner == self.rank


def group_targets(of: Targets, columns: int, sigmoid: bool, group) -> GroupTargets:
    """``of`` has the positives of this rank's rows among this rank's columns."""
    device, rank = of.target.device, dist.get_rank(group)
    sizes = shard_sizes(of.target.shape[0], device, group), shard_sizes(columns, device, group)
    for name, known in zip(("x", "y"), sizes, strict=True):
        if len(set(known)) > 1:
            raise ValueError(f"{name} must have as many rows on every rank, got {known}")
    if of.positives is not None:
        raise ValueError("positives go with one process: give labels with a group")
    labels, two_sided, dtype = of.column_labels, of.column_share is not None, of.row_share.dtype
    if labels is not None and not sigmoid:
        count = occurrences(of.target, gather(labels, group)) - int(of.exclude_diagonal)
        of = replace(of, row_share=shares(count, dtype))
        if two_sided:
            count = occurrences(labels, gather(of.target, group))
            of = replace(of, column_share=shares(count, dtype))
    return GroupTargets(
        of,
        None if labels is None else gather(labels, group),
        gather(of.column_share, group) if two_sided else None,
        columns,
        rank,
    )


def ring_cross_entropy(
    forward: Callable,
    backward: Callable,
    x: Tensor,
    y: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    of: GroupTargets,
    mask: Tensor | None,
    sigmoid: bool,
    options: tuple,
    group,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row lse, row t, column lse, column t); ``forward`` and ``backward`` are the local ops."""

    def arguments(owner, x, y, factor, bias):
        part = of.block(owner)
        seen = mask
        if mask is not None:
            seen = mask[:, owner * of.columns : (owner + 1) * of.columns]
        pairs = (part.target, part.column_labels, seen, None, part.row_share, part.column_share)
        return x, y, factor, bias, *pairs, None, None, *options, part.exclude_diagonal

    def sums(*args):
        return forward(*arguments(*args), False)[1:5]

    def gradients(owner, x, y, factor, bias, row_lse, column_lse, *upstream):
        saved = [row_lse.new_empty(0)] * 4
        inputs = arguments(owner, x, y, factor, bias)
        return backward(*inputs, row_lse, column_lse, *saved, None, *upstream)

    columns = of.all_column_shares is not None
    merge = torch.add if sigmoid else torch.logaddexp
    return ring_sums(sums, gradients, x, y, factor, bias, merge=merge, columns=columns, group=group)
