"""What the backward kernels share, and what they need to know of each query beforehand.

With r the share that the sink leaves (1 without one) and z the dropout,

dS = e u (r (dP − δ) + dlse),   e = e^(S − lse),   dP = z (dO Vᵀ) + w_i dc_j,
δ_i = ⟨dO_i, O_i⟩ + w_i a_i,   a_i = Σ_j P_ij dc_j.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from weft.triton_kernels.attention.rules import (
    key_bounds,
    limits,
    of_keys,
    of_queries,
    visible,
)
from weft.triton_kernels.attention.scores import (
    INFINITY,
    hash_of_queries,
    head_of,
    kept,
    load_rows,
    scores,
    sink_share,
    weights_of,
)
from weft.triton_kernels.common import operand


class Upstream(NamedTuple):
    """Gradients of the results, and what was saved; None for what is absent."""

    grad_out: object
    grad_out_strides: object  # (b, h, i, d)
    grad_sums: object  # (B, H, Nk)
    lse: object  # (B, H, Nq)
    share: object  # r, (B, H, Nq); None: 1
    delta: object  # δ, (B, H, Nq)
    grad_lse: object  # (B, H, Nq)


@triton.jit
def at_rows(pointer, args, b, h, i):
    """Where the rows of a (B, H, Nq) tensor are."""
    return pointer + (b.to(tl.int64) * args.heads + h) * args.Nq + i


@triton.jit
def of_rows(args, up, b, h, i):
    """(lse, r, δ, dlse, w) of queries; those without a visible key have lse = −∞ and r = 0."""
    inside = i < args.Nq
    lse = tl.load(at_rows(up.lse, args, b, h, i), mask=inside, other=-INFINITY)
    delta = tl.load(at_rows(up.delta, args, b, h, i), mask=inside, other=0.0)
    of_lse = tl.zeros(lse.shape, tl.float32)
    if up.grad_lse is not None:
        of_lse = tl.load(at_rows(up.grad_lse, args, b, h, i), mask=inside, other=0.0)
    share = tl.full(lse.shape, 1.0, tl.float32)
    if up.share is not None:
        share = tl.load(at_rows(up.share, args, b, h, i), mask=inside, other=0.0)
    return lse, share, delta, of_lse, of_query_weight(args, b, h, i)


@triton.jit
def of_query_weight(args, b, h, i):
    w = tl.full(i.shape, 1.0, tl.float32)
    if args.query_weight is not None:
        w = weights_of(args.query_weight, args.query_weight_strides, b, h, i, args.Nq)
    return w


@triton.jit
def of_columns(args, up, b, h, j):
    """(u, dc) of keys."""
    u = tl.full(j.shape, 1.0, tl.float32)
    of_sums = tl.zeros(j.shape, tl.float32)
    if args.key_weight is not None:
        u = weights_of(args.key_weight, args.key_weight_strides, b, h, j, args.Nk)
    if up.grad_sums is not None:
        at = up.grad_sums + (b.to(tl.int64) * args.heads + h) * args.Nk + j
        of_sums = tl.load(at, mask=j < args.Nk, other=0.0)
    return u, of_sums


@triton.jit
def load_grad_out(args, up, b, h, i, lse, Dv: tl.constexpr, BLOCK_V: tl.constexpr):
    """dO, 0 for queries without a visible key, where it may be NaN."""
    grad = load_rows(up.grad_out, up.grad_out_strides, b, h, i, args.Nq, Dv, BLOCK_V)
    return tl.where((lse != -INFINITY)[:, None], grad, 0.0)


@triton.jit
def tile_gradients(
    args,
    up,
    rules,
    b,
    h,
    i,
    j,
    j0,
    q,
    k,
    v,
    grad_out,
    rows,
    columns,
    queries,
    keys,
    hashes,
    PRECISION: tl.constexpr,
):
    """(z P, dS / u, dS, derivative of the softcap times dS, pairs that count) of a tile."""
    lse, share, delta, of_lse, w = rows
    u, of_sums = columns
    s, t = scores(args, b, h, q, k, i, j, PRECISION)
    see = visible(rules, i, j, j0, queries, keys, args.Nk) & (lse != -INFINITY)[:, None]
    e = tl.where(see, tl.exp(s - lse[:, None]), 0.0)
    p = e * share[:, None]
    rest = tl.zeros_like(e)
    if args.key_weight is not None:
        p *= u[None, :]
    if up.grad_out is not None:
        rest = tl.dot(operand(grad_out), operand(tl.trans(v)), input_precision=PRECISION)
        if args.seed is not None:
            keep = kept(args, hashes, j)
            rest = tl.where(keep, rest * args.grow, 0.0)
            p = tl.where(keep, p * args.grow, 0.0)
    if up.grad_sums is not None:
        rest += w[:, None] * of_sums[None, :]
    # Where e is 0, a NaN beside it must not count.
    rest = share[:, None] * (rest - delta[:, None])
    if up.grad_lse is not None:
        rest += of_lse[:, None]
    of_weight = tl.where(e != 0, e * rest, 0.0)
    grad = of_weight
    if args.key_weight is not None:
        grad = of_weight * u[None, :]
    of_product = grad
    if args.softcap is not None:
        of_product = grad * (1.0 - t * t)
    return p, of_weight, grad, of_product, see


@triton.jit
def rows_kernel(
    query,
    args,
    rules,
    up,
    out,
    grad_lse,
    of_sink,
    received,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """r, δ, dlse into up, −(1 − r) δ and a into of_sink and received where given: (B, H, Nq) all.

    SWEEP: δ as the mean of dP, found as a difference from ⟨dO_i, O_i⟩ with the roundings that the
    other kernels repeat, so that they cancel in dP − δ; and r and dlse make good for what rounding
    lse does to Σ_j P_ij. float32 would lose most of a digit otherwise.
    """
    tiles = tl.cdiv(args.Nq, BLOCK_M)
    i0 = tl.program_id(0) % tiles * BLOCK_M
    b, h = head_of(args, tl.program_id(0) // tiles)
    i = i0 + tl.arange(0, BLOCK_M)
    inside = i < args.Nq
    lse = tl.load(at_rows(up.lse, args, b, h, i), mask=inside, other=-INFINITY)
    dead = lse == -INFINITY
    share = tl.full([BLOCK_M], 1.0, tl.float32)
    if args.sink is not None:
        share = sink_share(tl.load(args.sink + h), lse)
    w = of_query_weight(args, b, h, i)
    delta = tl.zeros([BLOCK_M], tl.float32)
    received_sum = tl.zeros([BLOCK_M], tl.float32)
    correction = tl.full([BLOCK_M], 1.0, tl.float32)
    if up.grad_out is not None:
        grad = load_grad_out(args, up, b, h, i, lse, Dv, BLOCK_V)
        d = tl.arange(0, BLOCK_V)
        row = (b.to(tl.int64) * args.Nq + i) * args.heads + h
        at = out + row[:, None] * Dv + d[None, :]
        values = tl.load(at, mask=inside[:, None] & (d < Dv)[None, :], other=0.0)
        delta = tl.sum(grad.to(tl.float32) * values.to(tl.float32), 1)
    if SWEEP or up.grad_sums is not None:
        query_stop, key_stop = limits(rules, b, args.Nq, args.Nk)
        queries = of_queries(rules, b, h, i, args.Nq, query_stop)
        first, stop = key_bounds(
            rules, b, h, i0, i, queries, args.Nq, args.Nk, query_stop, key_stop
        )
        q = load_rows(query, args.query_strides, b, h, i, args.Nq, D, BLOCK_D)
        hashes = i
        if args.seed is not None:
            hashes = hash_of_queries(args, b, h, i)
        total, error = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        for j0 in range(first // BLOCK_N * BLOCK_N, stop, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            head = h // args.group
            k = load_rows(args.key, args.key_strides, b, head, j, args.Nk, D, BLOCK_D)
            s, _ = scores(args, b, h, q, k, i, j, PRECISION)
            keys = of_keys(rules, b, h, j, args.Nk, key_stop)
            see = visible(rules, i, j, j0, queries, keys, args.Nk) & (~dead)[:, None]
            u, of_sums = of_columns(args, up, b, h, j)
            p = tl.where(see, tl.exp(s - lse[:, None]) * u[None, :], 0.0)
            if up.grad_sums is not None:
                received_sum += tl.sum(tl.where(p != 0, p * of_sums[None, :], 0.0), 1)
            if SWEEP:
                total += tl.sum(p, 1)
                rest = w[:, None] * of_sums[None, :] - delta[:, None]
                if up.grad_out is not None:
                    v = load_rows(args.value, args.value_strides, b, head, j, args.Nk, Dv, BLOCK_V)
                    dp = tl.dot(operand(grad), operand(tl.trans(v)), input_precision=PRECISION)
                    if args.seed is not None:
                        dp = tl.where(kept(args, hashes, j), dp * args.grow, 0.0)
                    rest += dp
                error += tl.sum(tl.where(p != 0, p * rest, 0.0), 1)
        if SWEEP:
            correction = 1.0 / tl.where(total == 0, 1.0, total)
            delta = share * (delta + error * correction)
            received_sum *= share * correction
        else:
            received_sum *= share
            delta += w * received_sum
        if received is not None:
            a = tl.where(dead, 0.0, received_sum)
            tl.store(at_rows(received, args, b, h, i), a, mask=inside)
    delta = tl.where(dead, 0.0, delta)
    tl.store(at_rows(up.delta, args, b, h, i), delta, mask=inside)
    if up.grad_lse is not None:
        of_lse = tl.load(at_rows(grad_lse, args, b, h, i), mask=inside, other=0.0)
        of_lse = tl.where(dead, 0.0, of_lse * correction)
        tl.store(at_rows(up.grad_lse, args, b, h, i), of_lse, mask=inside)
    if up.share is not None:
        of_row = tl.where(dead, 0.0, share * correction)
        tl.store(at_rows(up.share, args, b, h, i), of_row, mask=inside)
    if of_sink is not None:
        grad = tl.where(dead, 0.0, (share - 1.0) * delta)
        tl.store(at_rows(of_sink, args, b, h, i), grad, mask=inside)


def example_launches(dtype: torch.dtype) -> None:
    """Without gradients of the key sums first, then with them."""
    from weft.triton_kernels.attention.examples import backward

    backward(dtype)
