"""Gradient of a bias: dS summed over what the bias is broadcast over.

A program owns a tile of a plane of the bias. It computes dS again for a slice of the batches and
heads (and tiles of queries or keys) that share it, keeps the sum on chip and leaves it as a part;
the parts are added in a fixed order.
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
from weft.triton_kernels.attention.rules import key_bounds, limits, of_keys, of_queries
from weft.triton_kernels.attention.scores import hash_of_queries, load_rows


@triton.jit
def _tile(
    args,
    up,
    rules,
    query,
    b,
    h,
    i0,
    j0,
    SKIP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS of a tile; SKIP: first look whether any of its pairs is visible."""
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    query_stop, key_stop = limits(rules, b, args.Nq, args.Nk)
    queries = of_queries(rules, b, h, i, args.Nq, query_stop)
    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    count = 1
    if SKIP:
        first, stop = key_bounds(
            rules, b, h, i0, i, queries, args.Nq, args.Nk, query_stop, key_stop
        )
        count = ((j0 < stop) & (j0 + BLOCK_N > first)).to(tl.int32)
    for _ in range(0, count):
        keys = of_keys(rules, b, h, j, args.Nk, key_stop)
        rows, columns = of_rows(args, up, b, h, i), of_columns(args, up, b, h, j)
        q = load_rows(query, args.query_strides, b, h, i, args.Nq, D, BLOCK_D)
        key_head = h // args.group
        k = load_rows(args.key, args.key_strides, b, key_head, j, args.Nk, D, BLOCK_D)
        v, grad_out = k, q
        if up.grad_out is not None:
            v = load_rows(args.value, args.value_strides, b, key_head, j, args.Nk, Dv, BLOCK_V)
            grad_out = load_grad_out(args, up, b, h, i, rows[0], Dv, BLOCK_V)
        hashes = i
        if args.seed is not None:
            hashes = hash_of_queries(args, b, h, i)
        _, _, own, _, _ = tile_gradients(args, up, rules, b, h, i, j, j0, q, k, v, grad_out, rows,
                                         columns, queries, keys, hashes, PRECISION)  # fmt: skip
        grad += own
    return grad


@triton.jit
def grad_bias_kernel(
    query,
    args,
    rules,
    up,
    parts,
    planes,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SKIP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """parts (slices, ·, ·, Nq or 1, Nk or 1) with ``planes`` batches and heads of their own; ROWS
    and COLUMNS: the bias has more than one. A slice takes ``length`` of the tiles that are summed.
    """
    tiles_m, tiles_n = tl.cdiv(args.Nq, BLOCK_M), tl.cdiv(args.Nk, BLOCK_N)
    own_m, summed_m, own_n, summed_n = 1, tiles_m, 1, tiles_n
    width = 1
    if ROWS:
        own_m, summed_m = tiles_m, 1
    if COLUMNS:
        own_n, summed_n = tiles_n, 1
        width = args.Nk
    tile = tl.program_id(0)
    tile_n, tile_m = tile % own_n, tile // own_n % own_m
    plane = tile // own_n // own_m
    part = plane // (planes[0] * planes[1])
    plane = plane % (planes[0] * planes[1])
    own_b, own_h = plane // planes[1], plane % planes[1]
    shared_b, shared_h = args.batches // planes[0], args.heads // planes[1]
    total = shared_b * shared_h * summed_m * summed_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(part * length, tl.minimum((part + 1) * length, total)):
        j0 = (tile_n + t % summed_n) * BLOCK_N
        i0 = (tile_m + t // summed_n % summed_m) * BLOCK_M
        other = t // summed_n // summed_m
        b, h = own_b + other // shared_h, own_h + other % shared_h
        acc += _tile(args, up, rules, query, b, h, i0, j0, SKIP, D, BLOCK_D, Dv, BLOCK_V, BLOCK_M,
                     BLOCK_N, PRECISION)  # fmt: skip
    i, j = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    base = part.to(tl.int64) * planes[0] * planes[1] + plane
    if ROWS and COLUMNS:
        at = parts + (base * args.Nq + i)[:, None] * width + j[None, :]
        tl.store(at, acc, mask=(i < args.Nq)[:, None] & (j < args.Nk)[None, :])
    elif ROWS:
        tl.store(parts + base * args.Nq + i, tl.sum(acc, 1), mask=i < args.Nq)
    elif COLUMNS:
        tl.store(parts + base * args.Nk + j, tl.sum(acc, 0), mask=j < args.Nk)
    else:
        tl.store(parts + base, tl.sum(tl.sum(acc, 1), 0))


def example_launches(dtype: torch.dtype) -> None:
    """Swin's windows first; then every kind of mask and of option."""
    from weft.triton_kernels.attention.examples import grad_bias

    grad_bias(dtype)
