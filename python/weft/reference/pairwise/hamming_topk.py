"""The k nearest binary codes: d_ij = popcount(q_i xor c_j), a row's first k by (d, j)."""

import torch
from torch import Tensor

BLOCK = 1 << 22  # distances held at a time


def pack_bits(x: Tensor) -> Tensor:
    """Bit b of byte w is whether x[..., 8w + b] > 0: (..., D) -> (..., ceil(D / 8))."""
    bits = torch.nn.functional.pad((x > 0).to(torch.uint8), (0, -x.shape[-1] % 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    return (bits.unflatten(-1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8)


def bits_of(codes: Tensor) -> Tensor:
    """(..., W) uint8 -> (..., 8 W) float32 of 0 and 1: sums below 2^24 are exact."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes[..., None] >> shifts) & 1).flatten(-2).float()


def hamming_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, k) int32 and int64; rows with fewer codes end in (2^31 − 1, −1)."""
    bits, M = bits_of(database), database.shape[0]
    found = min(k, M)
    distances = queries.new_full((queries.shape[0], k), 2**31 - 1, dtype=torch.int32)
    indices = queries.new_full((queries.shape[0], k), -1, dtype=torch.int64)
    rows = max(1, BLOCK // max(1, M))
    for i in range(0, queries.shape[0], rows):
        q = bits_of(queries[i : i + rows])
        d = q.sum(1)[:, None] + bits.sum(1) - 2 * q @ bits.mT
        order = d.sort(dim=1, stable=True).indices[:, :found]
        distances[i : i + rows, :found] = d.gather(1, order).to(torch.int32)
        indices[i : i + rows, :found] = order
    return distances, indices
