"""Subspace logits:  û_b = x_b / max(‖x_b‖, eps) if normalize else x_b,   z_bc = S_cᵀ û_b ∈ R^k,
                  logit_bc = γ ‖z_bc‖   or, squared,   γ ‖z_bc‖².
Backward:         q_bc = γ g_bc z_bc/‖z_bc‖  or  2 γ g_bc z_bc,   ∂W = Q Û,   ∂Û = Qᵀ W,
                  ∂x = (∂û − û⟨û, ∂û⟩)/‖x‖.

With the bases as the rows of W (C·k × D), and Z and Q as C·k × B, the work is three matrix
products. Two plans:

- fused: one kernel has a tile of samples × a tile of whole classes, each padded to a power of two
  of rows, sums over D with the matrix units, and takes the norms from the accumulator. Z is written
  only where the backward wants it.
- chunked: Z by cuBLAS for a group of classes into a bounded buffer, then the norms.

The backward is chunked: Q is elementwise in Z, its two products are large and plain. Groups do not
depend on anything but shapes, and no sum is atomic, so results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import (
    Config,
    configure,
    float32_precision,
    launch,
    operand,
    product,
    rounded,
    usable_scale,
)
from weft.triton_kernels.pairwise.bases import is_matrix, matrix_of, zero_padding
from weft.triton_kernels.pairwise.unit import unit, unit_backward

GROUP_BYTES = 64 << 20  # of each buffer: Z, Q, and W or ∂W where they need another layout
MOST_FUSED = 64  # padded rows of a class
ONE_WAVE = 132 * 128 * 128  # projections


def _tiles(n: int, b: int, d: int) -> dict[str, int]:
    """Rows of W (BLOCK_C classes), samples, and columns per step; see the kernel for GROUP_B."""
    return {"BLOCK_N": n, "BLOCK_B": b, "BLOCK_D": d, "GROUP_B": 16}


# (architecture, dtype class, shape class). Shared memory is at most 99 KB for 80, which serves 86,
# 89 and 120 too, and 227 KB from 90 on. Larger tiles spill in the epilogue.
TABLE = {
    (80, "half", "small_batch"): Config(_tiles(128, 32, 64), num_warps=4, num_stages=4),
    (80, "half", "large_batch"): Config(_tiles(128, 128, 32), num_warps=8, num_stages=4),
    (80, "float", "small_batch"): Config(_tiles(64, 32, 32), num_warps=4, num_stages=3),
    (80, "float", "large_batch"): Config(_tiles(64, 64, 32), num_warps=4, num_stages=3),
    (90, "half", "small_batch"): Config(_tiles(128, 64, 64), num_warps=4, num_stages=5),
    (90, "half", "large_batch"): Config(_tiles(128, 128, 64), num_warps=8, num_stages=4),
    (90, "float", "small_batch"): Config(_tiles(64, 64, 32), num_warps=4, num_stages=4),
    (90, "float", "large_batch"): Config(_tiles(128, 128, 32), num_warps=8, num_stages=4),
}
ELEMENTWISE = {(80,): Config({"BLOCK_B": 64, "BLOCK_K": 32, "BLOCK_C": 64}, num_warps=4)}
LARGEST_ELEMENTWISE = 2048


@triton.jit
def fused_forward_kernel(
    x,
    bases,
    dims,
    logits,
    projections,
    B,
    C,
    D,
    stride_xb,
    stride_xd,
    stride_sc,
    stride_sd,
    stride_sk,
    gamma,
    K: tl.constexpr,
    SQUARED: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_B: tl.constexpr,
):
    """One tile of BLOCK_B samples × BLOCK_C classes of BLOCK_K rows; a loop over D.

    Programs that run together have up to GROUP_B tiles of samples and few of classes: so W is read
    once per GROUP_B tiles of samples, which stay in the L2 cache.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    first_b = program // (GROUP_B * tiles_c) * GROUP_B
    group = min(tl.cdiv(B, BLOCK_B) - first_b, GROUP_B)
    within = program % (GROUP_B * tiles_c)
    b = (first_b + within % group).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_c = (within // group).to(tl.int64) * BLOCK_C

    n = tl.arange(0, BLOCK_C * BLOCK_K)
    c, row = first_c + n // BLOCK_K, n % BLOCK_K
    exist = (c < C) & (row < K)
    used = exist
    if dims is not None:
        used &= row < tl.load(dims + c, mask=c < C, other=0)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    x_tile = x + b[:, None] * stride_xb + d[None, :] * stride_xd
    w_tile = bases + (c * stride_sc + row * stride_sk)[None, :] + d[:, None] * stride_sd
    z = tl.zeros((BLOCK_B, BLOCK_C * BLOCK_K), tl.float32)
    for start in range(0, D, BLOCK_D):
        left = d < D - start
        x_values = tl.load(x_tile, mask=(b[:, None] < B) & left[None, :], other=0.0)
        w_values = tl.load(w_tile, mask=used[None, :] & left[:, None], other=0.0)
        z = tl.dot(operand(x_values), operand(w_values), z, input_precision=PRECISION)
        x_tile += BLOCK_D * stride_xd
        w_tile += BLOCK_D * stride_sd

    if SAVE:
        to = projections + (c * K + row)[None, :] * B + b[:, None]
        z_out = rounded(z, projections.dtype.element_ty)
        tl.store(to, z_out, mask=exist[None, :] & (b[:, None] < B))
    c = first_c + tl.arange(0, BLOCK_C)
    to = logits + b[:, None] * C + c[None, :]
    exist = (b[:, None] < B) & (c[None, :] < C)
    z = tl.reshape(z, (BLOCK_B, BLOCK_C, BLOCK_K))
    if K == 1 and not SQUARED:
        result = tl.reshape(tl.abs(z), exist.shape)
    else:
        total = tl.sum(z * z, 2)
        result = total if SQUARED else tl.sqrt(total)
    tl.store(to, rounded(gamma * result, logits.dtype.element_ty), mask=exist)
    if K > 1 and not SQUARED:
        safe = (total > 2.0**-80) & (total < 2.0**80)
        if tl.max((exist & ~safe).to(tl.int32)) > 0:  # squares have vanished or overflowed
            scale = usable_scale(tl.max(tl.abs(z), 2))
            z = z / scale[:, :, None]
            result = tl.sqrt(tl.sum(z * z, 2)) * scale
            tl.store(to, rounded(gamma * result, logits.dtype.element_ty), mask=exist)


@triton.jit
def _tile(B, C, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr):
    """Classes (BLOCK_C, 1) and samples (1, BLOCK_B) of this program, and which pairs exist."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    c = (program % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    b = (program // tiles_c).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    return c, b, (c < C) & (b < B)


@triton.jit
def _projections(z, c, b, exist, B, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Offsets and mask (BLOCK_C, BLOCK_K, BLOCK_B) in Z (C, K, B) from row `start`, and values."""
    row = start + tl.arange(0, BLOCK_K)[None, :, None]
    offsets = (c * K)[:, :, None] * B + row.to(tl.int64) * B + b[:, None, :]
    inside = exist[:, None, :] & (row < K)
    return offsets, inside, tl.load(z + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _length(z, c, b, exist, B, K: tl.constexpr, BLOCK_K: tl.constexpr, SQUARED: tl.constexpr):
    """(scale, sum of (z / scale)²) over the K rows of each class."""
    largest = tl.zeros(exist.shape, tl.float32)
    if not SQUARED:
        for start in tl.static_range(0, K, BLOCK_K):
            _, _, values = _projections(z, c, b, exist, B, start, K, BLOCK_K)
            largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
    scale = usable_scale(largest)
    total = tl.zeros(exist.shape, tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        _, _, values = _projections(z, c, b, exist, B, start, K, BLOCK_K)
        values = values / scale[:, None, :]
        total += tl.sum(values * values, 1)
    return scale, total


@triton.jit
def norms_kernel(
    z,
    logits,
    B,
    C,
    stride_logits,
    gamma,
    K: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """logit_bc from Z (C, K, B): tiles of classes × samples, a loop over K."""
    c, b, exist = _tile(B, C, BLOCK_C, BLOCK_B)
    scale, total = _length(z, c, b, exist, B, K, BLOCK_K, SQUARED)
    result = gamma * total if SQUARED else gamma * (tl.sqrt(total) * scale)
    to = logits + b * stride_logits + c
    tl.store(to, rounded(result, logits.dtype.element_ty), mask=exist)


@triton.jit
def projections_gradient_kernel(
    grad,
    z,
    q,
    B,
    C,
    stride_gb,
    stride_gc,
    gamma,
    K: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """q_bc from g and Z (C, K, B): tiles of classes × samples, a loop over K."""
    c, b, exist = _tile(B, C, BLOCK_C, BLOCK_B)
    factor = tl.load(grad + b * stride_gb + c * stride_gc, mask=exist, other=0.0).to(tl.float32)
    factor = gamma * factor
    if SQUARED:
        factor = 2 * factor
        scale = tl.full(exist.shape, 1.0, tl.float32)
    else:
        scale, total = _length(z, c, b, exist, B, K, BLOCK_K, SQUARED)
        factor = factor / tl.sqrt(tl.where(total == 0, 1.0, total))
    for start in tl.static_range(0, K, BLOCK_K):
        offsets, inside, values = _projections(z, c, b, exist, B, start, K, BLOCK_K)
        values = values / scale[:, None, :] * factor[:, None, :]
        tl.store(q + offsets, rounded(values, q.dtype.element_ty), mask=inside)


def plan_of(x: Tensor, bases: Tensor) -> str:
    """Where a tile does not use the matrix units, or is a third padding, cuBLAS is faster; and also
    where D is large, as its larger tiles then save more than reading Z back costs, unless the whole
    problem is about one tile for each multiprocessor.
    """
    (B, D), (C, _, k) = x.shape, bases.shape
    padded = triton.next_power_of_2(k)
    if x.dtype == torch.float32 and float32_precision() == "ieee":
        return "chunked"
    if 3 * padded > 4 * k or padded > MOST_FUSED:
        return "chunked"
    return "fused" if D <= 1024 or B * C * padded <= ONE_WAVE else "chunked"


def _fused(x, bases, dims, gamma, squared, logits, projections):
    (B, D), (C, _, k) = x.shape, bases.shape
    shape_class = "small_batch" if B <= 64 else "large_batch"
    dtype_class = "float" if x.dtype == torch.float32 else "half"
    config = configure(TABLE, x.device, dtype_class, shape_class)
    tiles = dict(config.tiles)
    BLOCK_K = triton.next_power_of_2(k)
    BLOCK_C = max(tiles.pop("BLOCK_N") // BLOCK_K, 1)
    launch(
        fused_forward_kernel,
        (triton.cdiv(B, tiles["BLOCK_B"]) * triton.cdiv(C, BLOCK_C),),
        Config(tiles, config.num_warps, config.num_stages),
        *(x, bases, dims, logits, projections, B, C, D),
        *(*x.stride(), *bases.stride(), gamma),
        K=k,
        SQUARED=squared,
        SAVE=projections.numel() > 0,
        PRECISION=float32_precision(),
        BLOCK_C=BLOCK_C,
        BLOCK_K=BLOCK_K,
        matrix_product=dtype_class == "half" or float32_precision() == "tf32",
    )


def _elementwise(kernel, squared: bool, k: int, B: int, C: int, *args) -> None:
    """One of the kernels over Z (C, k, B)."""
    config = configure(ELEMENTWISE, args[0].device)
    most = config.tiles
    BLOCK_B = min(triton.next_power_of_2(B), most["BLOCK_B"])
    BLOCK_K = min(triton.next_power_of_2(k), most["BLOCK_K"])
    room = LARGEST_ELEMENTWISE // (BLOCK_B * BLOCK_K)
    BLOCK_C = min(triton.next_power_of_2(C), most["BLOCK_C"], room)
    tiles = {"BLOCK_C": BLOCK_C, "BLOCK_K": BLOCK_K, "BLOCK_B": BLOCK_B}
    grid = (triton.cdiv(B, BLOCK_B) * triton.cdiv(C, BLOCK_C),)
    launch(kernel, grid, Config(tiles, config.num_warps), *args, K=k, SQUARED=squared)


def _groups(C: int, bytes_per_class: int) -> list[slice]:
    """Classes, by groups whose buffers are at most GROUP_BYTES (or of one class)."""
    size = max(GROUP_BYTES // max(bytes_per_class, 1), 1)
    return [slice(first, min(first + size, C)) for first in range(0, C, size)]


def subspace_logits(
    x: Tensor,
    bases: Tensor,
    dims: Tensor | None,
    gamma: float,
    squared: bool,
    normalize: bool,
    eps: float,
    save: bool,
    plan: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(logits (B, C), projections (C, k, B) if save else (0,)), both in the dtype of x."""
    (B, D), (C, _, k) = x.shape, bases.shape
    projections = x.new_empty((C, k, B) if save else (0,))
    if B * C * k == 0:
        return x.new_zeros(B, C), projections
    logits = x.new_empty(B, C)
    u = unit(x, eps) if normalize else x
    if (plan or plan_of(x, bases)) == "fused":
        _fused(u, bases, dims, gamma, squared, logits, projections)
        return logits, projections
    copied = 0 if dims is None and is_matrix(bases) else D
    buffered = 0 if save else B
    for group in _groups(C, k * x.itemsize * max(buffered, copied)):
        W = matrix_of(bases, dims, group)
        z = projections[group].view(-1, B) if save else x.new_empty(W.shape[0], B)
        product(W, u.T, out=z)
        out = logits[:, group]
        _elementwise(norms_kernel, squared, k, B, out.shape[1], z, out, B, out.shape[1], C, gamma)
    return logits, projections


def subspace_logits_backward(
    grad: Tensor,
    x: Tensor,
    bases: Tensor,
    dims: Tensor | None,
    projections: Tensor,
    gamma: float,
    squared: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(∂x (B, D) contiguous, ∂bases (C, D, k) with D as unit stride if `bases` has)."""
    (B, D), (C, _, k) = x.shape, bases.shape
    by_rows = bases.stride(1) == 1
    grad_bases = bases.new_empty(C, k, D).mT if by_rows else bases.new_empty(C, D, k)
    if B * C * k == 0:
        return x.new_zeros(B, D), grad_bases.zero_()
    u = unit(x, eps) if normalize else x
    copied = 0 if dims is None and is_matrix(bases) and by_rows else D
    groups = _groups(C, k * x.itemsize * max(B, copied))
    grad_u = None  # summed over the groups in float32
    for group in groups:
        W = matrix_of(bases, dims, group)
        rows, g = W.shape[0], grad[:, group]
        if projections.numel():
            z = projections[group].view(rows, B)
        else:
            z = product(W, u.T, out=x.new_empty(rows, B))
        q = x.new_empty(rows, B)
        sizes = (B, g.shape[1])
        kernel = projections_gradient_kernel
        _elementwise(kernel, squared, k, *sizes, g, z, q, *sizes, *g.stride(), gamma)
        if by_rows:
            product(q, u, out=grad_bases[group].mT.view(rows, D))
        else:
            by_class = product(q, u, out=x.new_empty(rows, D)).view(-1, k, D)
            grad_bases[group].copy_(by_class.mT)
        dtype = torch.float32 if normalize or len(groups) > 1 else x.dtype
        part = product(q.T, W, out=x.new_empty(B, D, dtype=dtype))
        grad_u = part if grad_u is None else grad_u.add_(part)
    if dims is not None:
        zero_padding(grad_bases, dims)
    return unit_backward(grad_u, x, eps) if normalize else grad_u.to(x.dtype), grad_bases


def example_launches(dtype: torch.dtype) -> None:
    """Every shape class, layouts of a layer, with and without the options that change code."""
    options = (25.0, False, True, 0.0)
    for B, k in [(256, 8), (64, 8), (4096, 8), (4096, 3), (256, 1), (256, 32)]:
        x = torch.empty(B, 2048, dtype=dtype, device="meta")
        bases = torch.empty(1000, k, 2048, dtype=dtype, device="meta").mT
        _, z = subspace_logits(x, bases, None, *options, True, "fused")
        logits, _ = subspace_logits(x, bases, None, *options, False, "chunked")
        subspace_logits_backward(logits, x, bases, None, z, *options)
    dims = torch.empty(1000, dtype=torch.int64, device="meta")
    options = (1.0, True, False, 0.0)
    logits, z = subspace_logits(x, bases, dims, *options, True, "fused")
    subspace_logits(x, bases, dims, *options, False, "chunked")
    subspace_logits_backward(logits, x, bases, dims, z, *options)
