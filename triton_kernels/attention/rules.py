"""Which keys a query sees, tile by tile: a conjunction of rules as the kernels take it.

weft.reference.attention.masks says what a rule means. Of a tile of queries the kernels first ask
which keys it can see at all (`key_bounds`), of a tile of keys by which queries it can be seen
(`query_bounds`): [first, stop), in closed form or by a look at the least and greatest label or at
the state of every 64. Within these bounds `of_queries` and `of_keys` gather what the rules need to
know of rows and columns, and `visible` compares them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

UNBOUNDED = 1 << 29  # an end of a band that no index reaches
WORD = tl.constexpr(64)  # keys of a packed word, and queries and keys of a tile with a state
SCAN = tl.constexpr(128)  # tiles that a look at labels or states takes at once


class Rules(NamedTuple):
    """All of these hold for a visible pair; None where there is no such rule.

    Planes of tensors take turns: batch b reads plane b mod batches, and so do heads.
    """

    low: object = None  # low ≤ j − i − shift ≤ high
    high: object = None
    shift: object = None  # (batches, Nq) int64
    shift_batches: object = 1
    query_lengths: object = None  # (batches,) int64
    query_lengths_batches: object = 1
    key_lengths: object = None
    key_lengths_batches: object = 1
    query_ids: object = None  # (batches, heads, Nq) int64
    query_ids_planes: object = (1, 1)
    query_ids_range: object = None  # (2, batches, heads, ⌈Nq / 64⌉), the least and the greatest
    key_ids: object = None
    key_ids_planes: object = (1, 1)
    key_ids_range: object = None
    words: object = None  # (batches, heads, Nq or 1, ⌈Nk / 64⌉) int64
    states: object = None  # (batches, heads, ⌈Nq / 64⌉ or 1, ⌈Nk / 64⌉) uint8
    words_planes: object = (1, 1)
    words_rows: object = 1  # Nq or 1
    sizes: object = None  # of a neighborhood, three of each
    kernel: object = None
    dilation: object = None


@triton.jit
def plane(planes, b, h):
    """The plane of a batch and head, of a tensor with (batches, heads) planes."""
    return (b % planes[0]) * planes[1] + h % planes[1]


@triton.jit
def limits(rules, b, Nq, Nk):
    """(queries, keys) that the lengths leave."""
    query_stop, key_stop = Nq, Nk
    if rules.query_lengths is not None:
        length = tl.load(rules.query_lengths + b % rules.query_lengths_batches)
        query_stop = tl.minimum(tl.maximum(length, 0), Nq).to(tl.int32)
    if rules.key_lengths is not None:
        length = tl.load(rules.key_lengths + b % rules.key_lengths_batches)
        key_stop = tl.minimum(tl.maximum(length, 0), Nk).to(tl.int32)
    return query_stop, key_stop


@triton.jit
def _code(position, size, dilation):
    """Residue · size + place among the positions of that residue: neighbours are consecutive."""
    return position % dilation * size + position // dilation


@triton.jit
def _window(position, size, kernel, dilation):
    """The code of the first key of a query's window along an axis."""
    residue = position % dilation
    last = (size - residue + dilation - 1) // dilation - kernel
    start = tl.minimum(tl.maximum(position // dilation - kernel // 2, 0), last)
    return residue * size + start


@triton.jit
def of_queries(rules, b, h, i, Nq, stop):
    """(exists, shift, id, offset in the words, window along three axes) of queries i."""
    shift, ids, row = tl.zeros_like(i), tl.zeros_like(i), tl.zeros_like(i)
    w0, w1, w2 = tl.zeros_like(i), tl.zeros_like(i), tl.zeros_like(i)
    if rules.shift is not None:
        at = rules.shift + (b % rules.shift_batches).to(tl.int64) * Nq + i
        shift = tl.load(at, mask=i < Nq, other=0).to(tl.int32)
    if rules.query_ids is not None:
        at = rules.query_ids + plane(rules.query_ids_planes, b, h).to(tl.int64) * Nq + i
        ids = tl.load(at, mask=i < Nq, other=0)
    if rules.words is not None:
        row = i.to(tl.int64) % rules.words_rows
        row += plane(rules.words_planes, b, h).to(tl.int64) * rules.words_rows
    if rules.sizes is not None:
        fast = i % rules.sizes[2]
        middle = i // rules.sizes[2] % rules.sizes[1]
        slow = i // rules.sizes[2] // rules.sizes[1]
        w0 = _window(slow, rules.sizes[0], rules.kernel[0], rules.dilation[0])
        w1 = _window(middle, rules.sizes[1], rules.kernel[1], rules.dilation[1])
        w2 = _window(fast, rules.sizes[2], rules.kernel[2], rules.dilation[2])
    return i < stop, shift, ids, row, w0, w1, w2


@triton.jit
def of_keys(rules, b, h, j, Nk, stop):
    """(exists, id, code along three axes) of keys j."""
    ids = tl.zeros_like(j)
    c0, c1, c2 = tl.zeros_like(j), tl.zeros_like(j), tl.zeros_like(j)
    if rules.key_ids is not None:
        at = rules.key_ids + plane(rules.key_ids_planes, b, h).to(tl.int64) * Nk + j
        ids = tl.load(at, mask=j < Nk, other=0)
    if rules.sizes is not None:
        fast = j % rules.sizes[2]
        middle = j // rules.sizes[2] % rules.sizes[1]
        slow = j // rules.sizes[2] // rules.sizes[1]
        c0 = _code(slow, rules.sizes[0], rules.dilation[0])
        c1 = _code(middle, rules.sizes[1], rules.dilation[1])
        c2 = _code(fast, rules.sizes[2], rules.dilation[2])
    return j < stop, ids, c0, c1, c2


@triton.jit
def visible(rules, i, j, j0, queries, keys, Nk):
    """The pairs of a tile that see each other; with packed bits the keys, from j0 on, are of one
    word."""
    query_exists, shift, query_ids, row, w0, w1, w2 = queries
    key_exists, key_ids, c0, c1, c2 = keys
    see = query_exists[:, None] & key_exists[None, :]
    if rules.low is not None:
        distance = j[None, :] - (i + shift)[:, None]
        see &= (distance >= rules.low) & (distance <= rules.high)
    if rules.query_ids is not None:
        see &= query_ids[:, None] == key_ids[None, :]
    if rules.sizes is not None:
        see &= (c0[None, :] - w0[:, None]).to(tl.uint32) < rules.kernel[0]
        see &= (c1[None, :] - w1[:, None]).to(tl.uint32) < rules.kernel[1]
        see &= (c2[None, :] - w2[:, None]).to(tl.uint32) < rules.kernel[2]
    if rules.words is not None:
        word = j0 // WORD
        at = rules.words + row * tl.cdiv(Nk, WORD) + word
        words = tl.load(at, mask=query_exists, other=0)
        see &= ((words[:, None] >> (j % WORD)[None, :]) & 1) != 0
    return see


@triton.jit
def seen_by_some(rules, see, j, first, stop):
    """Which keys of a tile some query sees: the others must not be multiplied, not even by 0, as
    they may be NaN. Bands and lengths have it in closed form, [first, stop)."""
    if (rules.shift is not None or rules.query_ids is not None) or (
        rules.words is not None or rules.sizes is not None
    ):
        seen = tl.max(see.to(tl.int32), 0) > 0
    else:
        seen = (j >= first) & (j < stop)
    return seen


@triton.jit
def state(rules, b, h, i0, j0, Nk):
    """Of the packed tile of 64 × 64 that has the pair (i0, j0): 0 empty, 1 partial, 2 full."""
    rows = tl.cdiv(rules.words_rows, WORD)
    row = plane(rules.words_planes, b, h).to(tl.int64) * rows + (i0 // WORD) % rows
    return tl.load(rules.states + row * tl.cdiv(Nk, WORD) + j0 // WORD)


@triton.jit
def _hits(ranges, planes, b, h, N, least, greatest):
    """[first, stop) of tiles of 64 whose labels may lie between ``least`` and ``greatest``."""
    tiles = tl.cdiv(N, WORD)
    offset = plane(planes, b, h).to(tl.int64) * tiles
    other = tl.full([], 1, tl.int64) * planes[0] * planes[1] * tiles
    first, stop = N, 0
    for start in range(0, tiles, SCAN):
        t = start + tl.arange(0, SCAN)
        lows = tl.load(ranges + offset + t, mask=t < tiles, other=0)
        highs = tl.load(ranges + other + offset + t, mask=t < tiles, other=0)
        hit = (t < tiles) & (lows <= greatest) & (highs >= least)
        first = tl.minimum(first, tl.min(tl.where(hit, t * WORD, N), 0))
        stop = tl.maximum(stop, tl.max(tl.where(hit, t * WORD + WORD, 0), 0))
    return first, stop


@triton.jit
def _extremes(ids, exists):
    """(least, greatest) of the labels that exist."""
    far = tl.full([], 1 << 62, tl.int64)
    least = tl.min(tl.where(exists, ids, far), 0)
    return least, tl.max(tl.where(exists, ids, -far), 0)


@triton.jit
def key_bounds(rules, b, h, i0, i, queries, Nq, Nk, query_stop, key_stop):
    """[first, stop) of the keys that a tile of queries from i0 on can see."""
    exists, shift, ids = queries[0], queries[1], queries[2]
    last = tl.minimum(i0 + i.shape[0], query_stop) - 1
    first, stop = 0 * i0, key_stop + 0 * i0
    if rules.query_lengths is not None:
        stop = tl.where(i0 < query_stop, stop, 0)
    if rules.low is not None:
        least, greatest = 0, 0
        if rules.shift is not None:
            least = tl.min(tl.where(exists, shift, Nk), 0)
            greatest = tl.max(tl.where(exists, shift, -Nq), 0)
        first = tl.maximum(first, i0 + rules.low + least)
        stop = tl.minimum(stop, last + rules.high + greatest + 1)
    if rules.key_ids_range is not None:
        least, greatest = _extremes(ids, exists)
        own_first, own_stop = _hits(
            rules.key_ids_range, rules.key_ids_planes, b, h, Nk, least, greatest
        )
        first, stop = tl.maximum(first, own_first), tl.minimum(stop, own_stop)
    if rules.sizes is not None:
        row = rules.sizes[1] * rules.sizes[2]
        size, kernel, dilation = rules.sizes[0], rules.kernel[0], rules.dilation[0]
        low = tl.minimum(i0 // row - kernel // 2 * dilation, size - kernel * dilation)
        high = last // row + (kernel - 1 - kernel // 2) * dilation
        first = tl.maximum(first, low * row)
        stop = tl.minimum(stop, (tl.maximum(high, dilation * kernel - 1) + 1) * row)
    if rules.words is not None:
        own_first, own_stop = Nk + 0 * i0, 0 * i0
        tiles = tl.cdiv(Nk, WORD)
        rows = tl.cdiv(rules.words_rows, WORD)
        line = plane(rules.words_planes, b, h).to(tl.int64) * rows + (i0 // WORD) % rows
        for start in range(0, tiles, SCAN):
            t = start + tl.arange(0, SCAN)
            hit = tl.load(rules.states + line * tiles + t, mask=t < tiles, other=0) != 0
            own_first = tl.minimum(own_first, tl.min(tl.where(hit, t * WORD, Nk), 0))
            own_stop = tl.maximum(own_stop, tl.max(tl.where(hit, t * WORD + WORD, 0), 0))
        first, stop = tl.maximum(first, own_first), tl.minimum(stop, own_stop)
    return first, tl.maximum(first, stop)


@triton.jit
def query_bounds(rules, b, h, j0, j, keys, Nq, Nk, query_stop, key_stop):
    """[first, stop) of the queries that can see a tile of keys from j0 on."""
    exists, ids = keys[0], keys[1]
    last = tl.minimum(j0 + j.shape[0], key_stop) - 1
    first, stop = 0 * j0, query_stop + 0 * j0
    if rules.key_lengths is not None:
        stop = tl.where(j0 < key_stop, stop, 0)
    if rules.low is not None and rules.shift is None:
        first = tl.maximum(first, j0 - rules.high)
        stop = tl.minimum(stop, last - rules.low + 1)
    if rules.query_ids_range is not None:
        least, greatest = _extremes(ids, exists)
        own_first, own_stop = _hits(
            rules.query_ids_range, rules.query_ids_planes, b, h, Nq, least, greatest
        )
        first, stop = tl.maximum(first, own_first), tl.minimum(stop, own_stop)
    if rules.sizes is not None:
        row = rules.sizes[1] * rules.sizes[2]
        size, kernel, dilation = rules.sizes[0], rules.kernel[0], rules.dilation[0]
        low = j0 // row
        high = last // row
        low = tl.where(low < kernel * dilation, 0, low - (kernel - 1 - kernel // 2) * dilation)
        high = tl.where(high >= size - kernel * dilation, size, high + kernel // 2 * dilation + 1)
        first, stop = tl.maximum(first, low * row), tl.minimum(stop, high * row)
    return first, tl.maximum(first, stop)


@triton.jit
def full_keys(rules, i0, i, query_stop, key_stop):
    """[first, stop) of the keys that all queries of a tile see, where a closed form says so."""
    last = i0 + i.shape[0] - 1
    first, stop = 0 * i0, key_stop + 0 * i0
    if rules.low is not None:
        first = tl.maximum(first, last + rules.low)
        stop = tl.minimum(stop, i0 + rules.high + 1)
    if rules.query_lengths is not None:
        stop = tl.where(last < query_stop, stop, 0)
    return first, tl.maximum(first, stop)
