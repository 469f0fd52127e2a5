"""A tile of scores, and what surrounds it; weft.reference.attention.attention has all
formulas.

S = softcap(scale q kᵀ) + bias
"""

from typing import NamedTuple

import triton
import triton.language as tl

from weft.triton_kernels.common import operand, tanh

INFINITY = tl.constexpr(float("inf"))


class Arguments(NamedTuple):
    """Of a call, as the kernels take it; None for what is absent. Strides are in elements, 0 along
    broadcast dimensions."""

    query: object
    query_strides: object  # (b, h, i, d)
    key: object
    key_strides: object
    value: object
    value_strides: object
    bias: object
    bias_strides: object  # (b, h, i, j)
    bias_floor: object  # a bias up to this is −∞
    sink: object  # (H,)
    key_weight: object
    key_weight_strides: object  # (b, h, j)
    query_weight: object
    query_weight_strides: object
    seed: object
    threshold: object  # of the hash of a weight that stays
    grow: object  # 1 / (1 − p)
    scale: object
    softcap: object
    batches: object
    heads: object
    group: object  # query heads of a key head
    Nq: object
    Nk: object


@triton.jit
def load_rows(pointer, strides, b, h, rows, N, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) of a (B, H, N, SIZE) tensor, 0 outside."""
    d = tl.arange(0, BLOCK)
    at = pointer + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    at += rows.to(tl.int64)[:, None] * strides[2] + d.to(tl.int64)[None, :] * strides[3]
    inside = (rows < N)[:, None]
    if SIZE != BLOCK:
        inside = inside & (d < SIZE)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def scores(args, b, h, q, k, i, j, PRECISION: tl.constexpr):
    """(S, t): t is the tanh of the softcap, or of no meaning."""
    products = tl.dot(operand(q), operand(tl.trans(k)), input_precision=PRECISION)
    t = products
    if args.softcap is not None:
        t = tanh(products * (args.scale / args.softcap))
        s = t * args.softcap
    else:
        s = products * args.scale
    if args.bias is not None:
        strides = args.bias_strides
        at = args.bias + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
        at += i.to(tl.int64)[:, None] * strides[2] + j.to(tl.int64)[None, :] * strides[3]
        inside = (i < args.Nq)[:, None] & (j < args.Nk)[None, :]
        bias = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        s += tl.where(bias <= args.bias_floor, -INFINITY, bias)
    return s, t


@triton.jit
def weights_of(pointer, strides, b, h, n, N):
    """Weights of keys or queries, float32."""
    at = pointer + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    return tl.load(at + n.to(tl.int64) * strides[2], mask=n < N, other=0.0)


@triton.jit
def sink_share(sink, lse):
    """r: how much of a query's attention the sink leaves; lse is not −∞."""
    return 1.0 / (1.0 + tl.exp(sink - lse))


@triton.jit
def _mix(x):
    """The finalizer of MurmurHash3, of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def hash_of_queries(args, b, h, i):
    """What the dropout needs of queries; weft.reference.attention.dropout has the formula."""
    seed = tl.load(args.seed)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    head = (b * args.heads + h).to(tl.uint32) * 2654435761
    row = i.to(tl.uint32) * 2246822519
    return _mix(_mix(low ^ head) ^ high ^ row)


@triton.jit
def kept(args, hashes, j):
    """Which weights of a tile the dropout keeps."""
    column = j.to(tl.uint32) * 3266489917
    drawn = _mix(hashes[:, None] ^ column[None, :])
    return drawn.to(tl.int64) >= args.threshold


@triton.jit
def head_of(args, program):
    """(batch, head) of a number of both."""
    return program // args.heads, program % args.heads
