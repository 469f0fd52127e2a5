"""The bases (C, D, k) of subspaces as one matrix W (C·k × D), without what padding holds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch

PADDING = {(80,): Config({"BLOCK_D": 512}, num_warps=4)}


@triton.jit
def zero_padding_kernel(
    bases,
    dims,
    D,
    stride_c,
    stride_d,
    stride_k,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """bases[c, :, dims[c]:] = 0: one class and one tile of D, a loop over the padding."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    c = (tl.program_id(0) // tiles_d).to(tl.int64)
    d = (tl.program_id(0) % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    to = bases + c * stride_c + d * stride_d
    zero = tl.zeros((BLOCK_D,), bases.dtype.element_ty)
    for column in range(tl.maximum(tl.load(dims + c), 0), K):
        tl.store(to + column * stride_k, zero, mask=d < D)


def zero_padding(bases: Tensor, dims: Tensor) -> None:
    """bases[c, :, dims[c]:] = 0, in place."""
    C, D, k = bases.shape
    config = configure(PADDING, bases.device)
    grid = (C * triton.cdiv(D, config.tiles["BLOCK_D"]),)
    launch(zero_padding_kernel, grid, config, bases, dims, D, *bases.stride(), K=k)


def is_matrix(bases: Tensor) -> bool:
    """Whether W (C·k, D) is a view of the bases, with D as the unit stride."""
    C, D, k = bases.shape
    stride_c, stride_d, stride_k = bases.stride()
    mergeable = C == 1 or k == 1 or stride_c == k * stride_k
    return mergeable and stride_d == 1 and min(stride_c, stride_k) >= D


def matrix_of(bases: Tensor, dims: Tensor | None, group: slice) -> Tensor:
    """W of a group of classes, copied where the layout needs it or padding must not be read."""
    bases = bases[group]
    C, D, k = bases.shape
    if dims is None and is_matrix(bases):
        return bases.mT.reshape(C * k, D)
    packed = bases.new_empty(C, k, D).copy_(bases.mT)
    if dims is not None:
        zero_padding(packed.mT, dims[group])
    return packed.view(C * k, D)


def example_launches(dtype: torch.dtype) -> None:
    bases = torch.empty(1000, 32, 2048, dtype=dtype, device="meta").mT
    zero_padding(bases, torch.empty(1000, dtype=torch.int64, device="meta"))
