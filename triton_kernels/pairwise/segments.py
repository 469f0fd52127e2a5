"""Sums over segments of pairs that are sorted by their target: the gradients of what is selected.

    ∂own_t = Σ_{e in segment t} w_e ∂u(own_t, other_{source_e})/∂own_t

    dot: other_e         sqeuclidean: 2 (own_t − other_e)         l1: sign(own_t − other_e)

A program has one target and a tile of D, and goes over the pairs of the segment in their order, so
results repeat. A pair without a source (−1) has no part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch, rounded
from weft.triton_kernels.pairwise.pairs import BASES, DOT, SQUARED

GRADIENT = {
    (80, "narrow"): Config({"BLOCK_E": 16, "BLOCK_D": 32}, num_warps=1),
    (80, "wide"): Config({"BLOCK_E": 16, "BLOCK_D": 128}, num_warps=4),
}
SUM = {(80,): Config({"BLOCK_E": 64}, num_warps=1)}


@triton.jit
def segment_gradient_kernel(
    own,
    other,
    ends,
    source,
    weights,
    out,
    D,
    stride_own,
    stride_own_d,
    stride_other,
    stride_other_d,
    BASE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_d = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // tiles_d).to(tl.int64)
    d = (tl.program_id(0) % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    point = tl.zeros((BLOCK_D,), tl.float32)
    if BASE != DOT:
        point_at = own + t * stride_own + d * stride_own_d
        point = tl.load(point_at, mask=d < D, other=0.0).to(tl.float32)
    last = tl.load(ends + t + 1)
    for start in range(tl.load(ends + t), last, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E).to(tl.int64)
        row = tl.load(source + e, mask=e < last, other=-1)
        inside = (row >= 0)[:, None] & (d < D)[None, :]
        weight = tl.load(weights + e, mask=e < last, other=0.0)[:, None]
        at = other + row[:, None] * stride_other + d[None, :] * stride_other_d
        term = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if BASE == SQUARED:
            term = 2 * (point[None, :] - term)
        elif BASE != DOT:
            term = point[None, :] - term
            sign = (term > 0).to(tl.float32) - (term < 0).to(tl.float32)
            term = tl.where(term == term, sign, term)
        total += tl.sum(tl.where(inside, weight * term, 0.0), 0)
    tl.store(out + t * D + d, rounded(total, out.dtype.element_ty), mask=d < D)


@triton.jit
def segment_sum_kernel(values, ends, out, BLOCK_E: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_E,), tl.float32)
    last = tl.load(ends + t + 1)
    for start in range(tl.load(ends + t), last, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E).to(tl.int64)
        total += tl.load(values + e, mask=e < last, other=0.0)
    tl.store(out + t, tl.sum(total, 0))


def segment_gradient(
    own: Tensor, other: Tensor, ends: Tensor, source: Tensor, weights: Tensor, base: str
) -> Tensor:
    """(T, D) in the dtype of ``own`` (T, D); segment t is the pairs ends[t] to ends[t + 1]."""
    T, D = own.shape
    out = own.new_empty(T, D)
    if out.numel() == 0:
        return out
    config = configure(GRADIENT, own.device, "narrow" if D <= 32 else "wide")
    grid = (T * triton.cdiv(D, config.tiles["BLOCK_D"]),)
    strides = (*own.stride(), *other.stride())
    arguments = (own, other, ends, source, weights, out, D, *strides)
    launch(segment_gradient_kernel, grid, config, *arguments, BASE=BASES[base])
    return out


def segment_sum(values: Tensor, ends: Tensor) -> Tensor:
    """(T,) sums of float32 values (E,)."""
    out = values.new_empty(len(ends) - 1)
    launch(segment_sum_kernel, (len(out),), configure(SUM, out.device), values, ends, out)
    return out


def example_launches(dtype: torch.dtype) -> None:
    make = lambda *shape, **kind: torch.empty(*shape, device="meta", **kind)  # noqa: E731
    ends, source = make(1001, dtype=torch.int64), make(10_000, dtype=torch.int64)
    for D in (16, 128):
        own, other = make(1000, D, dtype=dtype), make(4096, D, dtype=dtype)
        for base in BASES:
            segment_gradient(own, other, ends, source, make(10_000), base)
    segment_sum(make(10_000), ends)
