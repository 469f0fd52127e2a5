"""Gradients of queries, and of keys, values and key weights: two kernels and no atomics.

dQ = scale dS K: a program owns queries (and a part of the keys, as in the forward).
dV = (z P)ᵀ dO, dK = scale dSᵀ Q, du = Σ_i dS / u: a program owns keys and goes over the queries of
all heads that share them.
"""

import torch
import triton
import triton.language as tl

from weft.triton_kernels.attention.backward import (
    load_grad_out,
    of_columns,
    of_rows,
    tile_gradients,
)
from weft.triton_kernels.attention.rules import (
    key_bounds,
    limits,
    of_keys,
    of_queries,
    query_bounds,
    seen_by_some,
    state,
)
from weft.triton_kernels.attention.scores import INFINITY, hash_of_queries, head_of, load_rows
from weft.triton_kernels.common import operand, rounded


@triton.jit
def grad_query_kernel(
    query,
    args,
    rules,
    up,
    grad_query,
    width,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_query (parts · B, Nq, H, D)."""
    tiles = tl.cdiv(args.Nq, BLOCK_M)
    i0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    part = tl.program_id(0) // tiles % parts
    b, h = head_of(args, tl.program_id(0) // tiles // parts)
    i = i0 + tl.arange(0, BLOCK_M)
    query_stop, key_stop = limits(rules, b, args.Nq, args.Nk)
    queries = of_queries(rules, b, h, i, args.Nq, query_stop)
    bounds = key_bounds(rules, b, h, i0, i, queries, args.Nq, args.Nk, query_stop, key_stop)
    first = tl.maximum(bounds[0] // BLOCK_N * BLOCK_N, part * width)
    stop = tl.minimum(bounds[1], (part + 1) * width)
    rows = of_rows(args, up, b, h, i)
    q = load_rows(query, args.query_strides, b, h, i, args.Nq, D, BLOCK_D)
    grad_out = q
    if up.grad_out is not None:
        grad_out = load_grad_out(args, up, b, h, i, rows[0], Dv, BLOCK_V)
    hashes = i
    if args.seed is not None:
        hashes = hash_of_queries(args, b, h, i)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j0 in range(first, stop, BLOCK_N):
        if rules.words is None:
            acc = _tile_of_queries(acc, args, up, rules, b, h, i, q, grad_out, rows, queries,
                                   hashes, j0, bounds, key_stop, D, BLOCK_D, Dv, BLOCK_V, BLOCK_N,
                                   PRECISION)  # fmt: skip
        elif state(rules, b, h, i0, j0, args.Nk) != 0:
            acc = _tile_of_queries(acc, args, up, rules, b, h, i, q, grad_out, rows, queries,
                                   hashes, j0, bounds, key_stop, D, BLOCK_D, Dv, BLOCK_V, BLOCK_N,
                                   PRECISION)  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    row = ((b + part * args.batches).to(tl.int64) * args.Nq + i) * args.heads + h
    inside = (i < args.Nq)[:, None] & (d < D)[None, :]
    grad = rounded(acc * args.scale, grad_query.dtype.element_ty)
    tl.store(grad_query + row[:, None] * D + d[None, :], grad, mask=inside)


@triton.jit
def _tile_of_queries(
    acc,
    args,
    up,
    rules,
    b,
    h,
    i,
    q,
    grad_out,
    rows,
    queries,
    hashes,
    j0,
    bounds,
    key_stop,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + dS K of the keys from j0 on."""
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(args.key, args.key_strides, b, h // args.group, j, args.Nk, D, BLOCK_D)
    v = k
    if up.grad_out is not None:
        v = load_rows(args.value, args.value_strides, b, h // args.group, j, args.Nk, Dv, BLOCK_V)
    keys = of_keys(rules, b, h, j, args.Nk, key_stop)
    columns = of_columns(args, up, b, h, j)
    _, _, _, grad, see = tile_gradients(args, up, rules, b, h, i, j, j0, q, k, v, grad_out, rows,
                                        columns, queries, keys, hashes, PRECISION)  # fmt: skip
    k = tl.where(seen_by_some(rules, see, j, bounds[0], bounds[1])[:, None], k, 0.0)
    grad = rounded(grad, k.dtype)
    return tl.dot(operand(grad), operand(k), acc, input_precision=PRECISION)


@triton.jit
def grad_keys_kernel(
    query,
    args,
    rules,
    up,
    grad_key,
    grad_value,
    grad_weight,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_key (B, Nk, Hkv, D), grad_value (B, Nk, Hkv, Dv); grad_weight (B, H, Nk) or None."""
    tiles = tl.cdiv(args.Nk, BLOCK_N)
    j0 = tl.program_id(0) % tiles * BLOCK_N
    key_heads = args.heads // args.group
    b, key_head = tl.program_id(0) // tiles // key_heads, tl.program_id(0) // tiles % key_heads
    j = j0 + tl.arange(0, BLOCK_N)
    query_stop, key_stop = limits(rules, b, args.Nq, args.Nk)
    k = load_rows(args.key, args.key_strides, b, key_head, j, args.Nk, D, BLOCK_D)
    v = k
    if up.grad_out is not None:
        v = load_rows(args.value, args.value_strides, b, key_head, j, args.Nk, Dv, BLOCK_V)
    of_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for member in range(0, args.group):
        h = key_head * args.group + member
        keys = of_keys(rules, b, h, j, args.Nk, key_stop)
        columns = of_columns(args, up, b, h, j)
        first, stop = query_bounds(rules, b, h, j0, j, keys, args.Nq, args.Nk, query_stop, key_stop)
        of_weight = tl.zeros([BLOCK_N], tl.float32)
        for i0 in range(first // BLOCK_M * BLOCK_M, stop, BLOCK_M):
            if rules.words is None:
                of_key, of_value, of_weight = _tile_of_keys(
                    of_key, of_value, of_weight, query, args, up, rules, b, h, i0, j, j0, k, v,
                    columns, keys, query_stop, D, BLOCK_D, Dv, BLOCK_V, BLOCK_M, PRECISION,
                )  # fmt: skip
            elif state(rules, b, h, i0, j0, args.Nk) != 0:
                of_key, of_value, of_weight = _tile_of_keys(
                    of_key, of_value, of_weight, query, args, up, rules, b, h, i0, j, j0, k, v,
                    columns, keys, query_stop, D, BLOCK_D, Dv, BLOCK_V, BLOCK_M, PRECISION,
                )  # fmt: skip
        if grad_weight is not None:
            at = grad_weight + (b.to(tl.int64) * args.heads + h) * args.Nk + j
            tl.store(at, of_weight, mask=j < args.Nk)
    row = (b.to(tl.int64) * args.Nk + j) * key_heads + key_head
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    exists = (j < args.Nk)[:, None]
    of_key = rounded(of_key * args.scale, grad_key.dtype.element_ty)
    tl.store(grad_key + row[:, None] * D + d[None, :], of_key, mask=exists & (d < D)[None, :])
    of_value = rounded(of_value, grad_value.dtype.element_ty)
    at = grad_value + row[:, None] * Dv + dv[None, :]
    tl.store(at, of_value, mask=exists & (dv < Dv)[None, :])


@triton.jit
def _tile_of_keys(
    of_key,
    of_value,
    of_weight,
    query,
    args,
    up,
    rules,
    b,
    h,
    i0,
    j,
    j0,
    k,
    v,
    columns,
    keys,
    query_stop,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums with the queries from i0 on."""
    i = i0 + tl.arange(0, BLOCK_M)
    rows = of_rows(args, up, b, h, i)
    queries = of_queries(rules, b, h, i, args.Nq, query_stop)
    q = load_rows(query, args.query_strides, b, h, i, args.Nq, D, BLOCK_D)
    q = tl.where((rows[0] != -INFINITY)[:, None], q, 0.0)
    grad_out = q
    if up.grad_out is not None:
        grad_out = load_grad_out(args, up, b, h, i, rows[0], Dv, BLOCK_V)
    hashes = i
    if args.seed is not None:
        hashes = hash_of_queries(args, b, h, i)
    p, weight, _, grad, _ = tile_gradients(args, up, rules, b, h, i, j, j0, q, k, v, grad_out,
                                           rows, columns, queries, keys, hashes,
                                           PRECISION)  # fmt: skip
    if up.grad_out is not None:
        p = operand(tl.trans(rounded(p, grad_out.dtype)))
        of_value = tl.dot(p, operand(grad_out), of_value, input_precision=PRECISION)
    grad = operand(tl.trans(rounded(grad, q.dtype)))
    of_key = tl.dot(grad, operand(q), of_key, input_precision=PRECISION)
    return of_key, of_value, of_weight + tl.sum(weight, 0)


def example_launches(dtype: torch.dtype) -> None:
    """Plain heads of 64 first; then every kind of mask and of option."""
    from weft.triton_kernels.attention.examples import backward

    backward(dtype)
