"""The attention that keys receive: c_j = Σ_i w_i P_ij, from the log-sum-exps.

A program owns a tile of keys of a head and goes over the queries that can see them: one product.
"""

import torch
import triton
import triton.language as tl

from weft.triton_kernels.attention.rules import limits, of_keys, of_queries, query_bounds, visible
from weft.triton_kernels.attention.scores import (
    INFINITY,
    head_of,
    load_rows,
    scores,
    sink_share,
    weights_of,
)


@triton.jit
def _received(
    query,
    args,
    rules,
    b,
    h,
    i,
    j,
    j0,
    k,
    keys,
    lse,
    query_stop,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of P without the key weights."""
    queries = of_queries(rules, b, h, i, args.Nq, query_stop)
    q = load_rows(query, args.query_strides, b, h, i, args.Nq, D, BLOCK_D)
    s, _ = scores(args, b, h, q, k, i, j, PRECISION)
    at = lse + (b.to(tl.int64) * args.heads + h) * args.Nq + i
    of_row = tl.load(at, mask=i < args.Nq, other=-INFINITY)
    see = visible(rules, i, j, j0, queries, keys, args.Nk) & (of_row != -INFINITY)[:, None]
    p = tl.where(see, tl.exp(s - of_row[:, None]), 0.0)
    if args.sink is not None:
        p *= sink_share(tl.load(args.sink + h), of_row)[:, None]
    return p


@triton.jit
def key_sums_kernel(
    query,
    args,
    rules,
    lse,
    sums,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums (B, H, Nk), from lse (B, H, Nq)."""
    tiles = tl.cdiv(args.Nk, BLOCK_N)
    j0 = tl.program_id(0) % tiles * BLOCK_N
    program = tl.program_id(0) // tiles
    b, h = head_of(args, program)
    j = j0 + tl.arange(0, BLOCK_N)
    query_stop, key_stop = limits(rules, b, args.Nq, args.Nk)
    keys = of_keys(rules, b, h, j, args.Nk, key_stop)
    first, stop = query_bounds(rules, b, h, j0, j, keys, args.Nq, args.Nk, query_stop, key_stop)
    k = load_rows(args.key, args.key_strides, b, h // args.group, j, args.Nk, D, BLOCK_D)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for i0 in range(first // BLOCK_M * BLOCK_M, stop, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        if args.query_weight is not None:
            w = weights_of(args.query_weight, args.query_weight_strides, b, h, i, args.Nq)
            if tl.max(tl.abs(w), 0) > 0:  # often one query is picked
                p = _received(query, args, rules, b, h, i, j, j0, k, keys, lse, query_stop,
                              D, BLOCK_D, PRECISION)  # fmt: skip
                acc += tl.sum(tl.where(w[:, None] != 0, p * w[:, None], 0.0), 0)
        else:
            p = _received(query, args, rules, b, h, i, j, j0, k, keys, lse, query_stop,
                          D, BLOCK_D, PRECISION)  # fmt: skip
            acc += tl.sum(p, 0)
    if args.key_weight is not None:
        acc *= weights_of(args.key_weight, args.key_weight_strides, b, h, j, args.Nk)
    tl.store(sums + program.to(tl.int64) * args.Nk + j, acc, mask=j < args.Nk)


def example_launches(dtype: torch.dtype) -> None:
    """A head of 64; then every kind of mask and of option."""
    from weft.triton_kernels.attention.examples import key_sums

    key_sums(dtype)
