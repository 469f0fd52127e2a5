"""The best row of a segment, for each row of another matrix:

    v_slm = ⟨x_sl, y_m⟩  or  −‖x_sl − y_m‖²,   index_sm = argmax_l v_slm,   value_sm = max_l v_slm

1. best_kernel: one segment and a tile of y per program; a loop over the rows of the segment keeps
   the best and the second best v of every column, and the longest row.
2. finish_kernel: where the two are closer than the error of float32, the segment is searched again
   in float64, so the index is that of a search in float64 in every case; then the value of the
   chosen pair, by differences.

The backward gathers: pairs sorted by their row of x for ∂x, in the order of segments for ∂y.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch, operand
from weft.triton_kernels.pairwise.keys import (
    NONE,
    exact_argument,
    of_ordered_bits,
    ordered_bits,
    ordered_bits_64,
)
from weft.triton_kernels.pairwise.pairs import BASES, DIRECT_UP_TO, DOT, direct_tile, squared_norms
from weft.triton_kernels.pairwise.segments import segment_gradient


def _tiles(rows: int, m: int, d: int) -> dict[str, int]:
    return {"BLOCK_L": rows, "BLOCK_M": m, "BLOCK_D": d}


TABLE = {
    (80, "half", "few"): Config(_tiles(64, 32, 64), num_warps=4, num_stages=3),
    (80, "half", "many"): Config(_tiles(64, 64, 64), num_warps=8, num_stages=3),
    (80, "float", "few"): Config(_tiles(64, 32, 32), num_warps=4, num_stages=2),
    (80, "float", "many"): Config(_tiles(64, 64, 32), num_warps=8, num_stages=2),
    (90, "half", "few"): Config(_tiles(128, 32, 64), num_warps=4, num_stages=4),
    (90, "half", "many"): Config(_tiles(64, 128, 64), num_warps=8, num_stages=3),
    (90, "float", "few"): Config(_tiles(64, 32, 32), num_warps=4, num_stages=3),
    (90, "float", "many"): Config(_tiles(64, 64, 32), num_warps=8, num_stages=3),
}
FINISH = {(80,): Config({"BLOCK_L": 32, "BLOCK_M": 32, "BLOCK_D": 32}, num_warps=4)}


@triton.jit
def _segment(lengths, offsets, s, L, stride_s, stride_l):
    """(offset of the first row, rows); bad numbers lead to no access out of bounds."""
    if offsets is not None:  # L is the number of all rows
        first = tl.minimum(tl.maximum(tl.load(offsets + s), 0), L)
        last = tl.minimum(tl.maximum(tl.load(offsets + s + 1), first), L)
        start, length = first * stride_l, last - first
    else:
        start, length = s * stride_s, L + tl.zeros((1,), tl.int64)
        if lengths is not None:
            length = tl.minimum(tl.maximum(tl.load(lengths + s), 0), length)
        length = tl.max(length, 0)
    return start, length


@triton.jit
def best_kernel(
    x,
    y,
    lengths,
    offsets,
    y_squares,
    indices,
    uncertain,
    L,
    M,
    D,
    stride_xs,
    stride_xl,
    stride_xd,
    stride_ym,
    stride_yd,
    error,
    BASE: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    s = (tl.program_id(0) // tiles_m).to(tl.int64)
    m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start, length = _segment(lengths, offsets, s, L, stride_xs, stride_xl)
    x += start
    points = (x, y, length, M, D, stride_xl, stride_xd, stride_ym, stride_yd)
    lengths_y = tl.load(y_squares + m, mask=m < M, other=0.0)
    best = tl.full((BLOCK_M,), NONE, tl.int64)
    second = tl.full((BLOCK_M,), NONE, tl.int64)
    longest = tl.zeros((BLOCK_L,), tl.float32)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    for first in range(0, length, BLOCK_L):
        row = first + tl.arange(0, BLOCK_L).to(tl.int64)
        x_tile = x + row[:, None] * stride_xl + d[None, :] * stride_xd
        y_tile = y + m[None, :] * stride_ym + d[:, None] * stride_yd
        u = tl.zeros((BLOCK_L, BLOCK_M), tl.float32)
        squares = tl.zeros((BLOCK_L,), tl.float32)
        for left in range(0, D, BLOCK_D):
            inside = d < D - left
            x_values = tl.load(x_tile, mask=(row[:, None] < length) & inside[None, :], other=0.0)
            wide = x_values.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            if not DIRECT:
                y_values = tl.load(y_tile, mask=(m[None, :] < M) & inside[:, None], other=0.0)
                u = tl.dot(operand(x_values), operand(y_values), u, input_precision=PRECISION)
                y_tile += BLOCK_D * stride_yd
            x_tile += BLOCK_D * stride_xd
        if DIRECT:
            u = direct_tile(points, row, m, BASE)
        elif BASE != DOT:
            sums = squares[:, None] + lengths_y[None, :]
            u = sums - 2 * u
            close = ~(u > sums / 128) & (row < length)[:, None] & (m < M)[None, :]
            if tl.max(close.to(tl.int32)) > 0:
                u = tl.where(close, direct_tile(points, row, m, BASE), u)
        longest = tl.maximum(longest, tl.where(squares == squares, squares, 0.0))
        key = ordered_bits(-u if BASE == DOT else u).to(tl.int64) << 32
        key = tl.where((row < length)[:, None], key | row[:, None], NONE)
        ahead = tl.min(key, 0)
        behind = tl.min(tl.where(key == ahead[None, :], NONE, key), 0)
        second = tl.minimum(tl.maximum(best, ahead), tl.minimum(second, behind))
        best = tl.minimum(best, ahead)
    size_x, size_y = tl.sqrt(tl.max(longest, 0)), tl.sqrt(lengths_y)
    reach = size_x * size_y if BASE == DOT else (size_x + size_y) * (size_x + size_y)
    v = of_ordered_bits((best >> 32).to(tl.int32))
    next_v = of_ordered_bits((second >> 32).to(tl.int32))
    certain = (second == NONE) | (next_v - v > 2 * error * reach + 2.0**-126)
    at = s * M + m
    tl.store(indices + at, tl.where(best == NONE, -1, best & 0x7FFFFFFF), mask=m < M)
    tl.store(uncertain + at, tl.where(certain, 0, 1).to(tl.int8), mask=m < M)


@triton.jit
def finish_kernel(
    x,
    y,
    lengths,
    offsets,
    indices,
    uncertain,
    values,
    L,
    M,
    D,
    stride_xs,
    stride_xl,
    stride_xd,
    stride_ym,
    stride_yd,
    BASE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    s = (tl.program_id(0) // tiles_m).to(tl.int64)
    m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start, length = _segment(lengths, offsets, s, L, stride_xs, stride_xl)
    x += start
    index = tl.load(indices + s * M + m, mask=m < M, other=-1)
    open_column = tl.load(uncertain + s * M + m, mask=m < M, other=0)
    points = (y, x, M, length, D, stride_ym, stride_yd, stride_xl, stride_xd)
    # As a row of y against the rows of the segment; nothing but u enters.
    wide = (1.0, 0.0, None, None, None)
    while tl.max(open_column, 0) > 0:
        column = tl.min(tl.where(open_column > 0, m, NONE), 0)
        smallest = tl.min(tl.full((1,), NONE, tl.int64), 0)
        found = tl.min(tl.full((1,), NONE, tl.int64), 0)
        for first in range(0, length, BLOCK_L):
            row = first + tl.arange(0, BLOCK_L).to(tl.int64)
            u = exact_argument(points, wide, column, row, row < length, BASE, BLOCK_D)
            order = ordered_bits_64(-u if BASE == DOT else u)
            order = tl.where(row < length, order, NONE)
            here = tl.min(order, 0)
            at = tl.min(tl.where((order == here) & (row < length), row, NONE), 0)
            found = tl.where(here < smallest, at, found)
            smallest = tl.minimum(here, smallest)
        index = tl.where(m == column, found, index)
        open_column = tl.where(m == column, 0, open_column)
    exist = (index >= 0) & (m < M)
    u = tl.zeros((BLOCK_M,), tl.float32)
    for left in range(0, D, BLOCK_D):
        d = left + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = exist[:, None] & (d < D)[None, :]
        at_x = x + index[:, None] * stride_xl + d[None, :] * stride_xd
        at_y = y + m[:, None] * stride_ym + d[None, :] * stride_yd
        a = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at_y, mask=inside, other=0.0).to(tl.float32)
        u += tl.sum(a * b, 1) if BASE == DOT else tl.sum((a - b) * (a - b), 1)
    value = u if BASE == DOT else -u
    tl.store(values + s * M + m, tl.where(exist, value, -float("inf")), mask=m < M)
    tl.store(indices + s * M + m, index, mask=m < M)


def segment_max(
    x: Tensor, y: Tensor, lengths: Tensor | None, offsets: Tensor | None, base: str
) -> tuple[Tensor, Tensor]:
    """(values (S, M) in float32, indices (S, M))."""
    (M, D), L = y.shape, x.shape[-2]
    S = x.shape[0] if offsets is None else offsets.shape[0] - 1
    values = x.new_empty(S, M, dtype=torch.float32)
    indices = x.new_empty(S, M, dtype=torch.int64)
    if S * M == 0:
        return values, indices
    uncertain = x.new_empty(S, M, dtype=torch.int8)
    strides = ((0,) if offsets is not None else ()) + x.stride()
    dtype_class = "float" if x.dtype == torch.float32 else "half"
    config = configure(TABLE, x.device, dtype_class, "few" if M <= 32 else "many")
    precision = "tf32x3" if dtype_class == "float" else "ieee"
    direct = D <= DIRECT_UP_TO
    # Each of D products and sums, three parts of a tf32 product, and the steps to a distance.
    error = (D + 16) * 2.0**-22
    launch(
        best_kernel,
        (S * triton.cdiv(M, config.tiles["BLOCK_M"]),),
        config,
        *(x, y, lengths, offsets, squared_norms(y)[0], indices, uncertain, L, M, D),
        *(*strides, *y.stride(), error),
        matrix_product=not direct,
        BASE=BASES[base],
        DIRECT=direct,
        PRECISION=precision,
    )
    config = configure(FINISH, x.device)
    launch(
        finish_kernel,
        (S * triton.cdiv(M, config.tiles["BLOCK_M"]),),
        config,
        *(x, y, lengths, offsets, indices, uncertain, values, L, M, D, *strides, *y.stride()),
        BASE=BASES[base],
    )
    return values, indices


def segment_max_backward(
    grad: Tensor, x: Tensor, y: Tensor, indices: Tensor, offsets: Tensor | None, base: str
) -> tuple[Tensor, Tensor]:
    (M, D), S = y.shape, indices.shape[0]
    rows = x.reshape(-1, D)
    T = rows.shape[0]
    if S * M == 0:
        return x.new_zeros(x.shape), y.new_zeros(y.shape)
    if offsets is None:
        first = torch.arange(0, T, x.shape[1], device=x.device) if x.shape[1] else indices[:, 0]
    else:
        first = offsets[:-1]
    found = indices >= 0
    chosen = torch.where(found, first[:, None] + indices, -1)
    weights = grad.float() if base == "dot" else -grad.float()
    targets, order = torch.where(found, chosen, T).flatten().sort(stable=True)
    ends = torch.searchsorted(targets, torch.arange(T + 1, device=x.device))
    grad_x = segment_gradient(rows, y, ends, order % M, weights.flatten()[order], base)
    ends = torch.arange(0, S * M + 1, S, device=x.device)
    by_column = chosen.T.flatten(), weights.T.flatten()
    return grad_x.view(x.shape), segment_gradient(y, rows, ends, *by_column, base)


def example_launches(dtype: torch.dtype) -> None:
    """Late interaction, padded and packed, and prototypes on a map; one with few dimensions."""
    make = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    queries, documents = make(32, 128), make(1000, 1024, 128)
    lengths = torch.empty(1000, dtype=torch.int64, device="meta")
    offsets = torch.empty(1001, dtype=torch.int64, device="meta")
    segment_max(documents, queries, None, None, "dot")
    segment_max(documents, queries, lengths, None, "dot")
    values, indices = segment_max(documents.flatten(0, 1), queries, None, offsets, "dot")
    segment_max_backward(values, documents.flatten(0, 1), queries, indices, offsets, "dot")
    for D in (128, 4):
        features, prototypes = make(80, D, 49).mT, make(2000, D)
        values, indices = segment_max(features, prototypes, None, None, "sqeuclidean")
        segment_max_backward(values, features, prototypes, indices, None, "sqeuclidean")
