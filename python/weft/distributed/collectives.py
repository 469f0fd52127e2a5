"""Sums over a process group that gradients flow through, in the sense of one loss that all ranks
hold: where a rank's part enters a sum, its gradient is that of the sum; where all ranks read one
value, the gradient of the value is the sum of theirs."""

import torch
import torch.distributed as dist
from torch import Tensor


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _Copy.apply(grad, ctx.group), None


def copy_to_group(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """x, which is the same on all ranks and read by all: its gradient is the sum over ranks."""
    return _Copy.apply(x, group)


def sum_over_group(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Σ of x over ranks, the same on all; each rank's x gets the gradient of the sum."""
    return _Sum.apply(x, group)


@torch.no_grad()
def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all ranks, as many on each, in the order of ranks; without a gradient."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def shard_sizes(n: int, device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """n of every rank; waits for the device."""
    return gather(torch.tensor([n], device=device), group).tolist()


@torch.no_grad()
def rotate(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Sends each tensor to the next rank of the ring; returns those of the rank before."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if world == 1:
        return list(tensors)
    peers = [(rank + 1) % world, (rank - 1) % world]
    after, before = (p if group is None else dist.get_global_rank(group, p) for p in peers)
    sent = [t.contiguous() for t in tensors]
    received = [torch.empty_like(t) for t in sent]
    messages = []
    for mine, theirs in zip(sent, received, strict=True):  # bytes: any dtype, on any backend
        messages.append(dist.P2POp(dist.isend, _bytes(mine), after, group))
        messages.append(dist.P2POp(dist.irecv, _bytes(theirs), before, group))
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return received


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
