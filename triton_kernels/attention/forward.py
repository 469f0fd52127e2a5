"""Attention, forward: a program owns a tile of queries of a head and a part of its keys.

Over tiles of keys it keeps the maximum m, the sum l and the output, all scaled by e^−m:

m' = max(m, max_j S),   l' = e^(m − m') l + Σ_j e^(S − m'),   O' = e^(m − m') O + e^(S − m') V

The logarithm of a key weight adds to S. Few queries leave most of a GPU idle: then parts of the
keys have programs of their own, and `merge_kernel` joins their outputs by their log-sum-exps, in a
fixed order.
"""

import torch
import triton
import triton.language as tl

from weft.triton_kernels.attention.rules import (
    full_keys,
    key_bounds,
    limits,
    of_keys,
    of_queries,
    seen_by_some,
    state,
    visible,
)
from weft.triton_kernels.attention.scores import (
    INFINITY,
    hash_of_queries,
    head_of,
    kept,
    load_rows,
    scores,
    weights_of,
)
from weft.triton_kernels.common import operand, rounded


@triton.jit
def _tile(
    sums,
    args,
    rules,
    b,
    h,
    i,
    q,
    queries,
    hashes,
    j0,
    bounds,
    CHECKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(O, m, l) with the keys from j0 on; not CHECKED: all of them are visible to all queries."""
    out, m, l = sums
    first, stop = bounds
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(args.key, args.key_strides, b, h // args.group, j, args.Nk, D, BLOCK_D)
    v = load_rows(args.value, args.value_strides, b, h // args.group, j, args.Nk, Dv, BLOCK_V)
    s, _ = scores(args, b, h, q, k, i, j, PRECISION)
    if args.key_weight is not None:
        s += tl.log(weights_of(args.key_weight, args.key_weight_strides, b, h, j, args.Nk))[None, :]
    if CHECKED:
        keys = of_keys(rules, b, h, j, args.Nk, stop)
        see = visible(rules, i, j, j0, queries, keys, args.Nk)
        s = tl.where(see, s, -INFINITY)
        seen = seen_by_some(rules, see, j, first, stop)
        v = tl.where(seen[:, None], v, 0.0)
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == -INFINITY, 0.0, top)
    p = tl.exp(s - safe[:, None])
    shrink = tl.exp(m - safe)
    l = l * shrink + tl.sum(p, 1)
    if args.seed is not None:
        p = tl.where(kept(args, hashes, j), p, 0.0)
    p = rounded(p, v.dtype)
    out = out * shrink[:, None]
    out = tl.dot(operand(p), operand(v), out, input_precision=PRECISION)
    return out, top, l


@triton.jit
def forward_kernel(
    query,
    args,
    rules,
    out,
    lse,
    width,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out (parts · B, Nq, H, Dv), lse (parts · B, H, Nq), without the sink where SPLIT."""
    tiles = tl.cdiv(args.Nq, BLOCK_M)
    # Under a causal mask the last queries see most: they start first.
    i0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    part = tl.program_id(0) // tiles % parts
    b, h = head_of(args, tl.program_id(0) // tiles // parts)
    i = i0 + tl.arange(0, BLOCK_M)
    query_stop, key_stop = limits(rules, b, args.Nq, args.Nk)
    queries = of_queries(rules, b, h, i, args.Nq, query_stop)
    bounds = key_bounds(rules, b, h, i0, i, queries, args.Nq, args.Nk, query_stop, key_stop)
    first = tl.maximum(bounds[0] // BLOCK_N * BLOCK_N, part * width)
    stop = tl.minimum(bounds[1], (part + 1) * width)
    q = load_rows(query, args.query_strides, b, h, i, args.Nq, D, BLOCK_D)
    hashes = i
    if args.seed is not None:
        hashes = hash_of_queries(args, b, h, i)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.full([BLOCK_M], -INFINITY, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    sums = (acc, m, l)
    if rules.words is not None:
        for j0 in range(first, stop, BLOCK_N):
            if state(rules, b, h, i0, j0, args.Nk) != 0:
                sums = _tile(sums, args, rules, b, h, i, q, queries, hashes, j0, bounds, True,
                             D, BLOCK_D, Dv, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
    elif (rules.shift is not None or rules.query_ids is not None) or rules.sizes is not None:
        for j0 in range(first, stop, BLOCK_N):
            sums = _tile(sums, args, rules, b, h, i, q, queries, hashes, j0, bounds, True,
                         D, BLOCK_D, Dv, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
    else:
        full_first, full_stop = full_keys(rules, i0, i, query_stop, key_stop)
        full_first = tl.maximum(tl.cdiv(full_first, BLOCK_N) * BLOCK_N, first)
        full_stop = tl.minimum(full_stop, stop) // BLOCK_N * BLOCK_N
        full_stop = tl.maximum(full_first, full_stop)
        if rules.low is not None:
            for j0 in range(first, tl.minimum(full_first, stop), BLOCK_N):
                sums = _tile(sums, args, rules, b, h, i, q, queries, hashes, j0, bounds, True,
                             D, BLOCK_D, Dv, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
        for j0 in range(full_first, full_stop, BLOCK_N):
            sums = _tile(sums, args, rules, b, h, i, q, queries, hashes, j0, bounds, False,
                         D, BLOCK_D, Dv, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
        for j0 in range(full_stop, stop, BLOCK_N):
            sums = _tile(sums, args, rules, b, h, i, q, queries, hashes, j0, bounds, True,
                         D, BLOCK_D, Dv, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
    acc, m, l = sums
    if args.seed is not None:
        acc *= args.grow
    if not SPLIT:
        _finish(out, lse, args, b, h, i, acc, m, l, args.sink, Dv, BLOCK_V)
    else:
        b += part * args.batches
        _finish(out, lse, args, b, h, i, acc, m, l, None, Dv, BLOCK_V)


@triton.jit
def _finish(out, lse, args, b, h, i, acc, m, l, sink, Dv: tl.constexpr, BLOCK_V: tl.constexpr):
    """Divides by the sum, and by what the sink adds to it; a tile of (B, Nq, H, Dv), (B, H, Nq)."""
    divisor = tl.where(l == 0, 1.0, l)
    total = tl.where(l == 0, -INFINITY, m + tl.log(divisor))
    if sink is not None:
        more = tl.where(l == 0, 0.0, tl.exp(tl.load(sink + h) - total))
        divisor *= 1.0 + more
    d = tl.arange(0, BLOCK_V)
    row = (b.to(tl.int64) * args.Nq + i) * args.heads + h
    inside = (i < args.Nq)[:, None] & (d < Dv)[None, :]
    values = rounded(tl.div_rn(acc, tl.broadcast_to(divisor[:, None], acc.shape)),
                     out.dtype.element_ty)  # fmt: skip
    tl.store(out + row[:, None] * Dv + d[None, :], values, mask=inside)
    at = lse + (b.to(tl.int64) * args.heads + h) * args.Nq + i
    tl.store(at, total, mask=i < args.Nq)


@triton.jit
def merge_kernel(
    parts_out,
    parts_lse,
    args,
    out,
    lse,
    parts,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Joins (parts · B, Nq, H, Dv) and (parts · B, H, Nq), and adds the sink."""
    tiles = tl.cdiv(args.Nq, BLOCK_M)
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    b, h = head_of(args, tl.program_id(0) // tiles)
    d = tl.arange(0, BLOCK_V)
    inside = (i < args.Nq)[:, None] & (d < Dv)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.full([BLOCK_M], -INFINITY, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for part in range(0, parts):
        plane = (b + part * args.batches).to(tl.int64)
        at = parts_lse + (plane * args.heads + h) * args.Nq + i
        own = tl.load(at, mask=i < args.Nq, other=-INFINITY)
        row = (plane * args.Nq + i) * args.heads + h
        values = tl.load(parts_out + row[:, None] * Dv + d[None, :], mask=inside, other=0.0)
        top = tl.maximum(m, own)
        safe = tl.where(top == -INFINITY, 0.0, top)
        p, shrink = tl.exp(own - safe), tl.exp(m - safe)
        acc = acc * shrink[:, None] + p[:, None] * values
        l = l * shrink + p
        m = top
    _finish(out, lse, args, b, h, i, acc, m, l, args.sink, Dv, BLOCK_V)


def example_launches(dtype: torch.dtype) -> None:
    """Plain heads of 64 first; then every kind of mask and of option, and few queries."""
    from weft.triton_kernels.attention.examples import forward

    forward(dtype)
