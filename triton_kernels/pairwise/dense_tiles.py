"""Tiles of s_ij with their mask, for the dense reductions, and the weights of their backward.

Rows and columns are numbered in the whole problem, from (first_i, first_j) to (N, M) in the block
that a launch has.
"""

import triton
import triton.language as tl

from weft.triton_kernels.pairwise.pairs import argument_tile, base_tile

SUM, VALUES, LOGSUMEXP, MATRIX = (tl.constexpr(n) for n in range(4))
KINDS = {"sum": 0, "values": 1, "logsumexp": 2, "matrix": 3}
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def finite(v):
    return tl.abs(v) < INFINITY


@triton.jit
def allowed_tile(allow, i, j, N, M, SAME: tl.constexpr, OFF_DIAGONAL: tl.constexpr):
    """The pairs of a tile that exist and count."""
    mask, stride_n, stride_m, row_labels, column_labels = allow
    allowed = (i < N)[:, None] & (j < M)[None, :]
    if mask is not None:
        at = mask + i[:, None] * stride_n + j[None, :] * stride_m
        allowed &= tl.load(at, mask=allowed, other=0).to(tl.int1)
    if row_labels is not None:
        a = tl.load(row_labels + i, mask=i < N, other=0)[:, None]
        b = tl.load(column_labels + j, mask=j < M, other=0)[None, :]
        allowed &= (a == b) == SAME
    if OFF_DIAGONAL:
        allowed &= i[:, None] != j[None, :]
    return allowed


@triton.jit
def argument_and_mask(
    points,
    squares,
    given,
    affine,
    allow,
    i,
    j,
    BASE: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME: tl.constexpr,
    OFF_DIAGONAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(u, v, ∂v/∂u, which pairs count) of a tile; 0 where none does."""
    N, M = points[2], points[3]
    u = base_tile(points, squares, given, i, j, BASE, DIRECT, BLOCK_D, PRECISION)
    v, rate = argument_tile(u, affine, i, j, N, M)
    allowed = allowed_tile(allow, i, j, N, M, SAME, OFF_DIAGONAL)
    return tl.where(allowed, u, 0.0), tl.where(allowed, v, 0.0), rate, allowed


@triton.jit
def upstream_tile(s, allowed, upstream, i, j, N, M, KIND: tl.constexpr, SWAPPED: tl.constexpr):
    """∂L/∂s of a tile; SWAPPED where the columns of the problem are the rows of the result."""
    grad, stride_n, stride_m, out, values, E = upstream
    if KIND == MATRIX:
        at = grad + i[:, None] * stride_n + j[None, :] * stride_m
        w = tl.load(at, mask=allowed, other=0.0).to(tl.float32)
    elif KIND == VALUES:
        w = tl.zeros(s.shape, tl.float32)
        for e in range(0, E):
            a = tl.load(grad + i * E + e, mask=i < N, other=0.0)[:, None]
            w += a * tl.load(values + j * E + e, mask=j < M, other=0.0)[None, :]
    else:
        if SWAPPED:
            w = tl.load(grad + j, mask=j < M, other=0.0)[None, :] + tl.zeros(s.shape, tl.float32)
        else:
            w = tl.load(grad + i, mask=i < N, other=0.0)[:, None] + tl.zeros(s.shape, tl.float32)
        if KIND == LOGSUMEXP:
            if SWAPPED:
                lse = tl.load(out + j, mask=j < M, other=0.0)[None, :]
            else:
                lse = tl.load(out + i, mask=i < N, other=0.0)[:, None]
            w = tl.where(lse == -INFINITY, 0.0, w * tl.exp(s - lse))
    return tl.where(allowed, w, 0.0)
