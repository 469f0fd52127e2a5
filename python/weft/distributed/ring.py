"""Log-sum-exps of all rows against the rows of all ranks, with one remote block at a time.

The blocks of y go around the ring of ranks, and with them what is known of their columns: after as
many steps as there are ranks each is home again. Backwards they go around once more, and collect
their gradient.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.distributed.collectives import rotate


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums, gradients, merge, columns, group, x, y, factor, bias):
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        rows, block = None, [y]
        for step in range(world):
            owner = (rank - step) % world
            lse, t, column_lse, column_t = sums(owner, x, block[0], factor, bias)
            rows = (lse, t) if rows is None else (merge(rows[0], lse), rows[1] + t)
            if columns:
                known = block[1:] or [torch.full_like(column_lse, -torch.inf), 0 * column_t]
                block = [block[0], merge(known[0], column_lse), known[1] + column_t]
            if columns or step + 1 < world:
                block = rotate(block, group)
        of_columns = block[1:] if columns else (y.new_empty(0), y.new_empty(0))
        ctx.save_for_backward(x, y, factor, bias, rows[0], of_columns[0])
        ctx.gradients, ctx.columns, ctx.group = gradients, columns, group
        return *rows, *of_columns

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, y, factor, bias, row_lse, column_lse = ctx.saved_tensors
        world, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        block = [y, torch.zeros_like(y, dtype=wide, memory_format=torch.contiguous_format)]
        if ctx.columns:
            block += [column_lse, grads[2], grads[3]]
        total = [torch.zeros_like(x, dtype=wide), 0, 0]
        for step in range(world):
            owner = (rank - step) % world
            of_columns = block[2:] if ctx.columns else [column_lse, None, None]
            of_x, of_y, of_factor, of_bias = ctx.gradients(
                owner,
                x,
                block[0],
                factor,
                bias,
                row_lse,
                of_columns[0],
                *grads[:2],
                *of_columns[1:],
            )
            parts = (of_x, of_factor, of_bias)
            total = [sum_ + part for sum_, part in zip(total, parts, strict=True)]
            block[1] = block[1] + of_y
            block = rotate(block, ctx.group)
        of_factor = None if factor is None else total[1]
        of_bias = None if bias is None else total[2]
        return *[None] * 5, total[0].to(x.dtype), block[1].to(y.dtype), of_factor, of_bias


def ring_sums(
    sums: Callable,
    gradients: Callable,
    x: Tensor,
    y: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    *,
    merge: Callable = torch.logaddexp,
    columns: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row lse, row t, column lse, column t) of this rank's rows x, and of its rows y as columns,
    against the rows of all ranks.

    ``sums(owner, x, block, factor, bias)`` gives the four of x and the block of rank ``owner``;
    ``gradients(owner, x, block, factor, bias, row_lse, column_lse, *upstream)`` the gradients of
    its four tensors for the log-sum-exps of all blocks. Differentiable once.
    """
    return _Ring.apply(sums, gradients, merge, columns, group, x, y, factor, bias)
