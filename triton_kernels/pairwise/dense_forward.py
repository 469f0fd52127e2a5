"""The matrix of all s_ij, and their sums and log-sum-exps over columns.

A block of rows goes over the tiles of its part of the columns; the caller merges partial
results in a fixed order.
"""

import torch
import triton
import triton.language as tl

from weft.triton_kernels.common import rounded
from weft.triton_kernels.pairwise.dense_tiles import (
    INFINITY,
    LOGSUMEXP,
    VALUES,
    argument_and_mask,
    finite,
)
from weft.triton_kernels.pairwise.pairs import apply_function


@triton.jit
def matrix_kernel(
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
    out,
    stride_out,
    BASE: tl.constexpr,
    FUNCTION: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME: tl.constexpr,
    OFF_DIAGONAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    points = (x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd)
    squares, given = (x_squares, y_squares), (products, first_i, first_j)
    affine = (scale, shift, row_factor, column_factor, row_bias, column_bias)
    allow = (mask, stride_mn, stride_mm, row_labels, column_labels)
    tiles = tl.cdiv(M - first_j, BLOCK_M)
    i = first_i + (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = first_j + (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    _, v, _, allowed = argument_and_mask(
        points, squares, given, affine, allow, i, j, BASE, DIRECT, PRECISION, SAME, OFF_DIAGONAL,
        BLOCK_D,
    )  # fmt: skip
    s = rounded(apply_function(v, parameter, FUNCTION), out.dtype.element_ty)
    exist = (i < N)[:, None] & (j < M)[None, :]
    tl.store(out + i[:, None] * stride_out + j[None, :], s, mask=exist)


@triton.jit
def reduce_kernel(
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
    values,
    E,
    out,
    width,
    parts,
    BASE: tl.constexpr,
    FUNCTION: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME: tl.constexpr,
    OFF_DIAGONAL: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (parts, rows, E) of BLOCK_N rows, one part of the columns and BLOCK_E values each."""
    points = (x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd)
    squares, given = (x_squares, y_squares), (products, first_i, first_j)
    affine = (scale, shift, row_factor, column_factor, row_bias, column_bias)
    allow = (mask, stride_mn, stride_mm, row_labels, column_labels)
    tiles_e = tl.cdiv(E, BLOCK_E)
    first_e = tl.program_id(0) % tiles_e * BLOCK_E
    part = (tl.program_id(0) // tiles_e % parts).to(tl.int64)
    number = (tl.program_id(0) // (tiles_e * parts)).to(tl.int64)
    i = first_i + number * BLOCK_N + tl.arange(0, BLOCK_N)
    start = first_j + part * width
    top = tl.full((BLOCK_N,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    slot = tl.arange(0, BLOCK_E)[None, :]
    totals = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for first in range(start, tl.minimum(start + width, M), BLOCK_M):
        j = first + tl.arange(0, BLOCK_M).to(tl.int64)
        _u, v, _r, allowed = argument_and_mask(
            points, squares, given, affine, allow, i, j, BASE, DIRECT, PRECISION, SAME,
            OFF_DIAGONAL, BLOCK_D,
        )  # fmt: skip
        s = apply_function(v, parameter, FUNCTION)
        if KIND == LOGSUMEXP:
            s = tl.where(allowed, s, -INFINITY)
            here = tl.max(s, 1)
            here = tl.where(finite(here) | (here == -INFINITY), here, 0.0)
            safe = tl.where(here == -INFINITY, 0.0, here)
            sums = tl.sum(tl.exp(s - safe[:, None]), 1)
            new = tl.maximum(top, here)
            safe = tl.where(new == -INFINITY, 0.0, new)
            total = tl.where(total == 0, 0.0, total * tl.exp(top - safe))
            total += sums * tl.exp(here - safe)
            top = new
        elif KIND == VALUES:
            for e in range(0, BLOCK_E):
                # As a vector: the interpreter knows no scalar masks.
                inside = (j < M) & (tl.zeros((BLOCK_M,), tl.int32) + first_e + e < E)
                value = tl.load(values + j * E + first_e + e, mask=inside, other=0.0)
                column = tl.sum(tl.where(allowed, s * value[None, :], 0.0), 1)
                totals += tl.where(slot == e, column[:, None], 0.0)
        else:
            total += tl.sum(tl.where(allowed, s, 0.0), 1)
    at = part * (N - first_i) + i - first_i
    if KIND == VALUES:
        inside = (i < N)[:, None] & (first_e + slot < E)
        tl.store(out + at[:, None] * E + first_e + slot, totals, mask=inside)
    else:
        result = top + tl.log(total) if KIND == LOGSUMEXP else total
        tl.store(out + at, result, mask=i < N)


def example_launches(dtype: torch.dtype) -> None:
    from weft.triton_kernels.pairwise import pairwise

    pairwise.examples_of_forward(dtype)
