"""The backward of every dense reduction: from tiles of s and the weights w_ij = ∂L/∂s_ij

    g_ij = w_ij f'(v_ij) = ∂L/∂v_ij,       h_ij = scale α_i β_j g_ij = ∂L/∂u_ij

either H of a block of rows × columns, for the products that give ∂x and ∂y, or for the direct plan
∂x of a block of rows itself, from differences; ∂y is then ∂x of the swapped problem.
"""

import torch
import triton
import triton.language as tl

from weft.triton_kernels.common import rounded
from weft.triton_kernels.pairwise.dense_tiles import argument_and_mask, finite, upstream_tile
from weft.triton_kernels.pairwise.pairs import DOT, SQUARED, apply_function, slope


@triton.jit
def weights_kernel(
    x,
    y,
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_ym,
    stride_yd,
    x_squares,
    y_squares,
    scale,
    shift,
    row_factor,
    column_factor,
    row_bias,
    column_bias,
    parameter,
    products,
    first_i,
    first_j,
    mask,
    stride_mn,
    stride_mm,
    row_labels,
    column_labels,
    grad,
    stride_gn,
    stride_gm,
    saved,
    values,
    E,
    h,
    of_row,
    of_column,
    of_bias,
    BASE: tl.constexpr,
    FUNCTION: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME: tl.constexpr,
    OFF_DIAGONAL: tl.constexpr,
    KIND: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of H (rows, columns), and its parts of ∂α (tiles of columns, rows), of ∂β and of ∂bias
    (tiles of rows, columns)."""
    points = (x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd)
    squares, given = (x_squares, y_squares), (products, first_i, first_j)
    affine = (scale, shift, row_factor, column_factor, row_bias, column_bias)
    allow = (mask, stride_mn, stride_mm, row_labels, column_labels)
    upstream = (grad, stride_gn, stride_gm, saved, values, E)
    tiles = tl.cdiv(M - first_j, BLOCK_M)
    row_tile = (tl.program_id(0) // tiles).to(tl.int64)
    column_tile = (tl.program_id(0) % tiles).to(tl.int64)
    i = first_i + row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = first_j + column_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    u, v, rate, allowed = argument_and_mask(
        points, squares, given, affine, allow, i, j, BASE, DIRECT, PRECISION, SAME, OFF_DIAGONAL,
        BLOCK_D,
    )  # fmt: skip
    s = apply_function(v, parameter, FUNCTION)
    w = upstream_tile(s, allowed, upstream, i, j, N, M, KIND, SWAPPED)
    # A weight of 0 is a pair that does not count, whatever its slope is.
    g = tl.where(w == 0, 0.0, w * slope(v, parameter, FUNCTION))
    # The points of the products that follow have no infinities: their pairs say so here.
    spoiled = (g != 0) & ~finite(u)
    value = tl.where(spoiled, float("nan"), tl.where(g == 0, 0.0, rate * g))
    at = h + (i - first_i)[:, None] * (M - first_j) + (j - first_j)[None, :]
    exist = (i < N)[:, None] & (j < M)[None, :]
    tl.store(at, rounded(value, h.dtype.element_ty), mask=exist)
    gu = tl.where(g == 0, 0.0, scale * g * u)
    if of_row is not None:
        part = gu
        if column_factor is not None:
            part = gu * tl.load(column_factor + j, mask=j < M, other=0.0)[None, :]
        tl.store(of_row + column_tile * (N - first_i) + i - first_i, tl.sum(part, 1), mask=i < N)
    at = row_tile * (M - first_j) + j - first_j
    if of_column is not None:
        part = gu
        if row_factor is not None:
            part = gu * tl.load(row_factor + i, mask=i < N, other=0.0)[:, None]
        tl.store(of_column + at, tl.sum(part, 0), mask=j < M)
    if of_bias is not None:
        tl.store(of_bias + at, tl.sum(g, 0), mask=j < M)


@triton.jit
def direct_gradient_kernel(
    x,
    y,
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_ym,
    stride_yd,
    x_squares,
    y_squares,
    scale,
    shift,
    row_factor,
    column_factor,
    row_bias,
    column_bias,
    parameter,
    products,
    first_i,
    first_j,
    mask,
    stride_mn,
    stride_mm,
    row_labels,
    column_labels,
    grad,
    stride_gn,
    stride_gm,
    saved,
    values,
    E,
    out,
    of_row,
    of_bias,
    width,
    parts,
    tiles_d,
    BASE: tl.constexpr,
    FUNCTION: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME: tl.constexpr,
    OFF_DIAGONAL: tl.constexpr,
    KIND: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """∂x (parts, rows, D), and ∂α and ∂bias of the rows (parts, rows), from one part of the columns
    and BLOCK_E coordinates; tiles of s are computed again for each of these."""
    points = (x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd)
    squares, given = (x_squares, y_squares), (products, first_i, first_j)
    affine = (scale, shift, row_factor, column_factor, row_bias, column_bias)
    allow = (mask, stride_mn, stride_mm, row_labels, column_labels)
    upstream = (grad, stride_gn, stride_gm, saved, values, E)
    first_d = tl.program_id(0) % tiles_d * BLOCK_E
    part = (tl.program_id(0) // tiles_d % parts).to(tl.int64)
    number = (tl.program_id(0) // (tiles_d * parts)).to(tl.int64)
    i = first_i + number * BLOCK_N + tl.arange(0, BLOCK_N)
    start = first_j + part * width
    slot = tl.arange(0, BLOCK_E)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    row_total = tl.zeros((BLOCK_N,), tl.float32)
    bias_total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(start, tl.minimum(start + width, M), BLOCK_M):
        j = first + tl.arange(0, BLOCK_M).to(tl.int64)
        u, v, rate, allowed = argument_and_mask(
            points, squares, given, affine, allow, i, j, BASE, DIRECT, PRECISION, SAME,
            OFF_DIAGONAL, BLOCK_D,
        )  # fmt: skip
        s = apply_function(v, parameter, FUNCTION)
        w = upstream_tile(s, allowed, upstream, i, j, N, M, KIND, SWAPPED)
        g = tl.where(w == 0, 0.0, w * slope(v, parameter, FUNCTION))
        h = tl.where(g == 0, 0.0, rate * g)
        for e in range(0, BLOCK_E):
            d = first_d + e
            # As vectors: the interpreter knows no scalar masks.
            inside = (j < M) & (tl.zeros((BLOCK_M,), tl.int32) + d < D)
            b = tl.load(y + j * stride_ym + d * stride_yd, mask=inside, other=0.0)
            inside = (i < N) & (tl.zeros((BLOCK_N,), tl.int32) + d < D)
            a = tl.load(x + i * stride_xn + d * stride_xd, mask=inside, other=0.0)
            a, b = a.to(tl.float32)[:, None], b.to(tl.float32)[None, :]
            if BASE == DOT:
                term = b + tl.zeros(h.shape, tl.float32)
            elif BASE == SQUARED:
                term = 2 * (a - b)
            else:
                term = a - b
                sign = (term > 0).to(tl.float32) - (term < 0).to(tl.float32)
                term = tl.where(term == term, sign, term)
            column = tl.sum(tl.where(h == 0, 0.0, h * term), 1)
            total += tl.where(slot == e, column[:, None], 0.0)
        bias_total += tl.sum(g, 1)
        if of_row is not None:
            gu = tl.where(g == 0, 0.0, scale * g * u)
            if column_factor is not None:
                gu *= tl.load(column_factor + j, mask=j < M, other=0.0)[None, :]
            row_total += tl.sum(gu, 1)
    at = part * (N - first_i) + i - first_i
    if out is not None:
        inside = (i < N)[:, None] & (first_d + slot < D)
        tl.store(out + at[:, None] * D + first_d + slot, total, mask=inside)
    first_tile = (i < N) & (tl.zeros((BLOCK_N,), tl.int32) + first_d == 0)
    if of_row is not None:
        tl.store(of_row + at, row_total, mask=first_tile)
    if of_bias is not None:
        tl.store(of_bias + at, bias_total, mask=first_tile)


def example_launches(dtype: torch.dtype) -> None:
    from weft.triton_kernels.pairwise import pairwise

    pairwise.examples_of_backward(dtype)
