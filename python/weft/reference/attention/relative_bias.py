"""bias_hij = table[index_ij, h], and the sum of the gradient of all pairs of an entry, in the order
of the pairs: the same bits at every run, on any device."""

import torch
from torch import Tensor


def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """(1, H, Nq, Nk)."""
    return table[index].permute(2, 0, 1)[None]


def relative_bias_backward(grad: Tensor, index: Tensor, T: int) -> Tensor:
    """(T, H), summed in float32 for half precision."""
    H = grad.shape[1]
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    order = index.flatten().argsort(stable=True)
    lengths = torch.bincount(index.flatten(), minlength=T)
    rows = grad.reshape(H, -1).T.to(wide)[order]
    sums = torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, initial=0.0)
    return sums.to(grad.dtype).contiguous()
