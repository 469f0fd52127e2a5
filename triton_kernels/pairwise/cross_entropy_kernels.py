"""The kernels of the cross entropies: sums over tiles of s, and weights ∂L/∂⟨x, y⟩ from them.

v_ij = scale · factor · ⟨x_i, y_j⟩ + bias_j,   s_ij = c tanh(v_ij / c) or v_ij,   less the margin of
a positive. Rows and columns are numbered in the whole problem, from (first_i, first_j) to (N, M) in
the block that a launch has.
"""

import torch
import triton
import triton.language as tl

from weft.triton_kernels.common import rounded, tanh
from weft.triton_kernels.pairwise.pairs import log1p, product_tile

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _finite(v):
    return tl.abs(v) < INFINITY


@triton.jit
def _logits(
    points,
    block,
    pairs,
    options,
    i,
    j,
    SOFTCAP: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(u, s before the margin, s, positives, pairs that count, scale · factor) of a tile."""
    N, M = points[2], points[3]
    u, first_i, first_j = block
    factor, bias, target, labels, mask, stride_mn, stride_mm, positives, stride_pn, stride_pm = (
        pairs
    )
    scale, softcap, margin, _ = options
    exist = (i < N)[:, None] & (j < M)[None, :]
    if u is not None:
        at = u + (i - first_i)[:, None] * (M - first_j) + (j - first_j)[None, :]
        products = tl.load(at, mask=exist, other=0.0)
    else:
        products = product_tile(points, i, j, BLOCK_D, PRECISION)
    rate = scale
    if factor is not None:
        rate = scale * tl.load(factor)
    s = products * rate
    if bias is not None:
        s += tl.load(bias + j, mask=j < M, other=0.0)[None, :]
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    if positives is not None:
        at = positives + i[:, None] * stride_pn + j[None, :] * stride_pm
        positive = tl.load(at, mask=exist, other=0).to(tl.int1)
    else:
        own = j
        if labels is not None:
            own = tl.load(labels + j, mask=j < M, other=0)
        positive = exist & (tl.load(target + i, mask=i < N, other=-1)[:, None] == own[None, :])
    counts = exist
    if mask is not None:
        at = mask + i[:, None] * stride_mn + j[None, :] * stride_mm
        counts = positive | tl.load(at, mask=exist, other=0).to(tl.int1)
    if EXCLUDE_DIAGONAL:
        other = i[:, None] != j[None, :]
        positive, counts = positive & other, counts & other
    return products, s, tl.where(positive, s - margin, s), positive, counts, rate


@triton.jit
def _log_sum(s, counts, AXIS: tl.constexpr):
    """(maximum, Σ e^(s − maximum)): −∞ of nothing, and 0 in place of ∞."""
    s = tl.where(counts, s, -INFINITY)
    top = tl.max(s, AXIS)
    safe = tl.where(_finite(top), top, 0.0)
    sums = tl.sum(tl.exp(s - tl.expand_dims(safe, AXIS)), AXIS)
    return tl.where(top == -INFINITY, top, safe), sums


@triton.jit
def _softplus(s):
    return tl.maximum(s, 0.0) + log1p(tl.exp(-tl.abs(s))) + (s - s)  # a NaN stays one


@triton.jit
def sums_kernel(
    x,
    y,
    u,
    first_i,
    first_j,
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_ym,
    stride_yd,
    factor,
    bias,
    target,
    labels,
    mask,
    stride_mn,
    stride_mm,
    positives,
    stride_pn,
    stride_pm,
    scale,
    softcap,
    margin,
    uniform,
    row_share,
    column_share,
    row_lse,
    row_t,
    column_lse,
    column_t,
    width,
    parts,
    SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_N rows and one part of the columns: lse and t of the rows over the part, and of every
    column over the rows."""
    points = (x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd)
    block = (u, first_i, first_j)
    pairs = (factor, bias, target, labels, mask, stride_mn, stride_mm, positives, stride_pn,
             stride_pm)  # fmt: skip
    options = (scale, softcap, margin, uniform)
    number = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    i = first_i + number.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = first_j + part.to(tl.int64) * width
    top = tl.full((BLOCK_N,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    of_positives = tl.zeros((BLOCK_N,), tl.float32)
    of_all = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(start, tl.minimum(start + width, M), BLOCK_M):
        j = first + tl.arange(0, BLOCK_M).to(tl.int64)
        _u, _s, s, positive, counts, _r = _logits(
            points, block, pairs, options, i, j, SOFTCAP, EXCLUDE_DIAGONAL, PRECISION, BLOCK_D
        )
        chosen = tl.where(positive, s, 0.0)
        every = tl.where(counts, s, 0.0)
        if SIGMOID:
            loss = tl.where(counts, _softplus(s), 0.0)
            total += tl.sum(loss, 1)
        else:
            here, sums = _log_sum(s, counts, 1)
            new = tl.maximum(top, here)
            safe = tl.where(new == -INFINITY, 0.0, new)
            total = tl.where(total == 0, 0.0, total * tl.exp(top - safe))
            total += sums * tl.exp(here - safe)
            top = new
        of_positives += tl.sum(chosen, 1)
        of_all += tl.sum(every, 1)
        if column_share is not None:
            if SIGMOID:
                lse = tl.sum(loss, 0)
            else:
                column_top, column_total = _log_sum(s, counts, 0)
                lse = column_top + tl.log(column_total)
            share = tl.load(column_share + j, mask=j < M, other=0.0)
            t = share * tl.sum(chosen, 0) + uniform * tl.sum(every, 0)
            at = number.to(tl.int64) * (M - first_j) + j - first_j
            tl.store(column_lse + at, lse, mask=j < M)
            tl.store(column_t + at, t, mask=j < M)
    lse = total if SIGMOID else top + tl.log(total)
    share = tl.load(row_share + i, mask=i < N, other=0.0)
    at = part.to(tl.int64) * (N - first_i) + i - first_i
    tl.store(row_lse + at, lse, mask=i < N)
    tl.store(row_t + at, share * of_positives + uniform * of_all, mask=i < N)


@triton.jit
def _side(s, positive, counts, lse, of_lse, of_positive, of_all, SIGMOID: tl.constexpr):
    """a p + b T of a tile, with vectors already expanded along it."""
    if SIGMOID:
        p = 1.0 / (1.0 + tl.exp(-s))
    else:
        p = tl.where(lse != -INFINITY, tl.exp(s - lse), 0.0)
    p = tl.where(counts & ((of_lse != 0) | _finite(p)), p, 0.0)
    return of_lse * p + tl.where(positive, of_positive, 0.0) + tl.where(counts, of_all, 0.0)


@triton.jit
def weights_kernel(
    x,
    y,
    u,
    first_i,
    first_j,
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_ym,
    stride_yd,
    factor,
    bias,
    target,
    labels,
    mask,
    stride_mn,
    stride_mm,
    positives,
    stride_pn,
    stride_pm,
    scale,
    softcap,
    margin,
    uniform,
    row_lse,
    of_row_lse,
    of_row_positive,
    of_row_all,
    column_lse,
    of_column_lse,
    of_column_positive,
    of_column_all,
    h,
    of_bias,
    of_factor,
    SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of H; Σ_i g_ij of its columns, and scale Σ_ij g_ij ⟨x_i, y_j⟩."""
    points = (x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd)
    block = (u, first_i, first_j)
    pairs = (factor, bias, target, labels, mask, stride_mn, stride_mm, positives, stride_pn,
             stride_pm)  # fmt: skip
    options = (scale, softcap, margin, uniform)
    tiles = tl.cdiv(M - first_j, BLOCK_M)
    number = tl.program_id(0) // tiles
    i = first_i + number.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = first_j + (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    products, capped, s, positive, counts, rate = _logits(
        points, block, pairs, options, i, j, SOFTCAP, EXCLUDE_DIAGONAL, PRECISION, BLOCK_D
    )
    row, column = i < N, j < M
    w = _side(
        s,
        positive,
        counts,
        tl.load(row_lse + i, mask=row, other=0.0)[:, None],
        tl.load(of_row_lse + i, mask=row, other=0.0)[:, None],
        tl.load(of_row_positive + i, mask=row, other=0.0)[:, None],
        tl.load(of_row_all + i, mask=row, other=0.0)[:, None],
        SIGMOID,
    )
    if column_lse is not None:
        w += _side(
            s,
            positive,
            counts,
            tl.load(column_lse + j, mask=column, other=0.0)[None, :],
            tl.load(of_column_lse + j, mask=column, other=0.0)[None, :],
            tl.load(of_column_positive + j, mask=column, other=0.0)[None, :],
            tl.load(of_column_all + j, mask=column, other=0.0)[None, :],
            SIGMOID,
        )
    if SOFTCAP:
        ratio = capped / softcap
        w = tl.where(w == 0, 0.0, w * (1 - ratio * ratio))
    # The points of the products that follow have no infinities: their pairs say so here.
    w = tl.where((w != 0) & ~_finite(products), float("nan"), w)
    exist = row[:, None] & column[None, :]
    at = h + (i - first_i)[:, None] * (M - first_j) + (j - first_j)[None, :]
    tl.store(at, rounded(rate * w, h.dtype.element_ty), mask=exist)
    w = tl.where(exist, w, 0.0)
    if of_bias is not None:
        at = of_bias + number.to(tl.int64) * (M - first_j) + j - first_j
        tl.store(at, tl.sum(w, 0), mask=column)
    if of_factor is not None:
        total = tl.sum(tl.sum(tl.where(w == 0, 0.0, w * products), 1), 0)
        tl.store(of_factor + tl.program_id(0), scale * total)


def example_launches(dtype: torch.dtype) -> None:
    """A classifier with a large vocabulary, contrastive losses by every kind of target."""
    from weft.triton_kernels.pairwise import cross_entropy as ops

    make = lambda *shape, **kind: torch.empty(*shape, device="meta", **kind)  # noqa: E731

    def both(x, y, factor, bias, labels, mask, positives, columns, *options):
        (N, _), M = x.shape, y.shape[0]
        target = make(N, dtype=torch.int64)
        shares = (make(N), make(M) if columns else None)
        inputs = (x, y, factor, bias, target, labels, mask, positives, *shares, *shares, *options)
        _, lse, _, column_lse, _, *saved = ops.pairwise_cross_entropy(*inputs, False)
        upstream = (make(()), *[None] * 4)
        ops.pairwise_cross_entropy_backward(*inputs, lse, column_lse, *saved, *upstream)

    plain = (1.0, 0.0, 0.0, 0.0, False, False)
    x, y = make(4096, 512, dtype=dtype), make(8192, 512, dtype=dtype)
    bits, labels = make(4096, 8192, dtype=torch.bool), make(8192, dtype=torch.int64)
    both(x, y, None, None, None, None, None, False, *plain)
    both(x, y, make(()), None, None, None, None, True, *plain)
    both(x, y, None, None, labels, bits, None, True, *plain[:5], True)
    both(x, y, make(()), make(8192), None, None, bits, False, *plain[:4], True, False)
    x, y = make(4096, 4096, dtype=dtype), make(128256, 4096, dtype=dtype)
    both(x, y, None, make(128256), None, None, None, False, 1.0, 30.0, 0.1, 1e-6, False, False)
