"""The k nearest binary codes of each query: d_ij = popcount(q_i xor c_j), the first k by (d, j).

A block of queries goes over the tiles of codes of its part of the database and keeps K >= k keys,
(d, j) as one integer. A key that is better than the worst of the list replaces it; a tile is left
as soon as no query has such a key. Keys differ, so the k smallest of all parts are the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch
from weft.triton_kernels.pairwise.keys import NONE

PROGRAMS = 264  # two for each multiprocessor

TABLE = {
    (80,): Config({"BLOCK_N": 32, "BLOCK_M": 64}, num_warps=4),
}


@triton.jit
def bit_count(v):
    """The number of ones of int32 words."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v += v >> 8
    v += v >> 16
    return v & 0x3F


@triton.jit
def search_kernel(
    queries,
    database,
    N,
    M,
    words,
    keys,
    part,
    parts,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The K smallest keys of BLOCK_N queries and `part` codes, in no order: keys (N, parts, K)."""
    number = tl.program_id(0) % parts
    i = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = number.to(tl.int64) * part
    last = tl.minimum(first + part, M)
    # What is no code has keys of its own, so that one of them is replaced at a time.
    best = NONE - tl.arange(0, K).to(tl.int64)[None, :] + tl.zeros((BLOCK_N, K), tl.int64)
    worst = tl.max(best, 1)
    for start in range(first, last, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        distance = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for w in range(0, words):
            q = tl.load(queries + i * words + w, mask=i < N, other=0)
            c = tl.load(database + j * words + w, mask=j < last, other=0)
            distance += bit_count(q[:, None] ^ c[None, :])
        key = (distance.to(tl.int64) << 32) | j[None, :]
        key = tl.where((i < N)[:, None] & (j < last)[None, :], key, NONE)
        new = tl.min(key, 1)
        while tl.max((new < worst).to(tl.int32)) > 0:
            replaced = (new < worst)[:, None] & (best == worst[:, None])
            best = tl.where(replaced, new[:, None], best)
            key = tl.where(key == new[:, None], NONE, key)
            worst = tl.max(best, 1)
            new = tl.min(key, 1)
    at = ((i * parts + number) * K)[:, None] + tl.arange(0, K)[None, :]
    tl.store(keys + at, best, mask=(i < N)[:, None])


def as_words(codes: Tensor) -> Tensor:
    """(N, words) int32, one word at least; missing bytes are 0 in queries and database alike."""
    W = codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, max(4 - W, -W % 4)))
    return padded.contiguous().view(torch.int32)


def hamming_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(distances (N, k) int32, indices (N, k) int64)."""
    N, M = queries.shape[0], database.shape[0]
    if N * M == 0:
        missing = queries.new_full((N, k), 2**31 - 1, dtype=torch.int32)
        return missing, queries.new_full((N, k), -1, dtype=torch.int64)
    q, c = as_words(queries), as_words(database)
    config = configure(TABLE, queries.device)
    blocks = triton.cdiv(N, config.tiles["BLOCK_N"])
    tiles = triton.cdiv(M, config.tiles["BLOCK_M"])
    part = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks))) * config.tiles["BLOCK_M"]
    parts = triton.cdiv(M, part)
    K = max(2, triton.next_power_of_2(k))
    keys = queries.new_empty(N, parts, K, dtype=torch.int64)
    launch(search_kernel, (blocks * parts,), config, q, c, N, M, q.shape[1], keys, part, parts, K=K)
    keys = keys.flatten(1).sort(1).values[:, :k]
    distances = (keys >> 32).to(torch.int32)  # 2^31 − 1 for what is no code
    return distances, torch.where(distances == 2**31 - 1, -1, keys & 0xFFFFFFFF)


def example_launches(dtype: torch.dtype) -> None:
    """Few and many queries; codes have one dtype, whatever that of the others."""
    make = lambda *shape: torch.empty(*shape, dtype=torch.uint8, device="meta")  # noqa: E731
    for N, M, W, k in ((1000, 100_000, 32, 10), (1, 10_000, 13, 1), (100_000, 1000, 8, 32)):
        hamming_topk(make(N, W), make(M, W), k)
