"""Rows of length 1, and the gradient of that.

    û = x / max(‖x‖, eps),   ∂x = (∂û − û⟨û, ∂û⟩)/‖x‖,  or ∂û/eps where ‖x‖ <= eps;
    at x = 0 without eps, û and ∂x are 0.

A program has a few whole rows. It goes over them in tiles of BLOCK_D columns: the largest |x|, then
the sums that need it, then the result. A row that fits into one tile is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch, rounded, usable_scale

WIDEST = 4096  # columns of a tile
TABLE = {
    (80, "narrow"): Config({"BLOCK_B": 16, "BLOCK_D": 64}, num_warps=4),
    (80, "medium"): Config({"BLOCK_B": 2, "BLOCK_D": 512}, num_warps=4),
    (80, "wide"): Config({"BLOCK_B": 1, "BLOCK_D": WIDEST}, num_warps=8),
}


@triton.jit
def _lengths(x, b, B, D, stride_b, stride_d, eps, BLOCK_D: tl.constexpr, TILES: tl.constexpr):
    """(scale, length / scale, eps / scale) of the rows b."""
    row = (x + b * stride_b)[:, None]
    largest = tl.zeros(b.shape, tl.float32)
    for tile in tl.static_range(TILES):
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        values = tl.load(row + d * stride_d, mask=(b[:, None] < B) & (d < D), other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(values.to(tl.float32)), 1))
    scale = usable_scale(largest)
    total = tl.zeros(b.shape, tl.float32)
    for tile in tl.static_range(TILES):
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        values = tl.load(row + d * stride_d, mask=(b[:, None] < B) & (d < D), other=0.0)
        values = values.to(tl.float32) / scale[:, None]
        total += tl.sum(values * values, 1)
    return scale, tl.sqrt(total), eps / scale


@triton.jit
def unit_kernel(
    x,
    out,
    B,
    D,
    stride_b,
    stride_d,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale, length, bound = _lengths(x, b, B, D, stride_b, stride_d, eps, BLOCK_D, TILES)
    divisor = tl.where(length <= bound, bound, length)  # a NaN stays one
    divisor = tl.where(divisor == 0, 1.0, divisor)
    for tile in tl.static_range(TILES):
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        inside = (b[:, None] < B) & (d < D)
        values = tl.load(x + b[:, None] * stride_b + d * stride_d, mask=inside, other=0.0)
        values = values.to(tl.float32) / scale[:, None] / divisor[:, None]
        tl.store(out + b[:, None] * D + d, rounded(values, out.dtype.element_ty), mask=inside)


@triton.jit
def unit_backward_kernel(
    grad,
    x,
    out,
    B,
    D,
    stride_b,
    stride_d,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale, length, bound = _lengths(x, b, B, D, stride_b, stride_d, eps, BLOCK_D, TILES)
    constant = length <= bound  # the divisor does not depend on x
    divisor = tl.where(constant, bound, length)
    zero = divisor == 0
    divisor = tl.where(zero, 1.0, divisor)
    along = tl.zeros(b.shape, tl.float32)
    for tile in tl.static_range(TILES):
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        inside = (b[:, None] < B) & (d < D)
        values = tl.load(x + b[:, None] * stride_b + d * stride_d, mask=inside, other=0.0)
        values = values.to(tl.float32) / scale[:, None] / divisor[:, None]
        upstream = tl.load(grad + b[:, None] * D + d, mask=inside, other=0.0).to(tl.float32)
        along += tl.sum(values * upstream, 1)
    for tile in tl.static_range(TILES):
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        inside = (b[:, None] < B) & (d < D)
        values = tl.load(x + b[:, None] * stride_b + d * stride_d, mask=inside, other=0.0)
        values = values.to(tl.float32) / scale[:, None] / divisor[:, None]
        upstream = tl.load(grad + b[:, None] * D + d, mask=inside, other=0.0).to(tl.float32)
        tangent = upstream - tl.where(constant[:, None], 0.0, values * along[:, None])
        result = tl.where(zero[:, None], 0.0, tangent / divisor[:, None] / scale[:, None])
        tl.store(out + b[:, None] * D + d, rounded(result, out.dtype.element_ty), mask=inside)


def _launch(kernel, x: Tensor, *tensors: Tensor, eps: float) -> None:
    B, D = x.shape
    shape_class = "narrow" if D <= 64 else "medium" if D <= 512 else "wide"
    config = configure(TABLE, x.device, shape_class)
    BLOCK_D = min(triton.next_power_of_2(D), config.tiles["BLOCK_D"])
    grid = (triton.cdiv(B, config.tiles["BLOCK_B"]),)
    tiles = {"BLOCK_D": BLOCK_D, "TILES": triton.cdiv(D, BLOCK_D)}
    launch(kernel, grid, config, *tensors, B, D, *x.stride(), eps, **tiles)


def unit(x: Tensor, eps: float) -> Tensor:
    """x (B, D) -> û, contiguous, in the dtype of x."""
    out = x.new_empty(x.shape)
    if x.numel():
        _launch(unit_kernel, x, x, out, eps=eps)
    return out


def unit_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """∂x, contiguous, in the dtype of x, for ∂û contiguous in any dtype."""
    out = x.new_empty(x.shape)
    if x.numel():
        _launch(unit_backward_kernel, x, grad, x, out, eps=eps)
    return out


def example_launches(dtype: torch.dtype) -> None:
    for D in (48, 384, 2048, 10000):
        x = torch.empty(256, D, dtype=dtype, device="meta")
        unit(x, 0.0)
        unit_backward(x.new_empty(x.shape, dtype=torch.float32), x, 0.0)
