"""Nearest binary codes, and the packing of signs into codes."""

from typing import NamedTuple

import torch
from torch import Tensor

from weft.ops.registration import Op, cpu, reference, register_no_gradient, triton
from weft.reference.pairwise import hamming_topk as formula

CODES = frozenset({torch.uint8})
MOST_ON_TRITON = 32  # codes for a query: each program holds their keys in registers


class HammingTopK(NamedTuple):
    distances: Tensor
    indices: Tensor


def pack_bits(x: Tensor) -> Tensor:
    """The signs of x as binary codes: bit b of byte w is whether ``x[..., 8 * w + b] > 0``.

    Args:
        x: ``(..., D)``, of any dtype that compares with 0 (bool too).

    Returns:
        ``(..., ceil(D / 8))`` uint8; missing bits of the last byte are 0.

    Raises:
        TypeError: x is not a tensor, or complex.
    """
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(f"x must be a real tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    return formula.pack_bits(x)


def hamming_topk(queries: Tensor, database: Tensor, k: int = 1) -> HammingTopK:
    r"""The k binary codes nearest to each query by Hamming distance; ties to the lowest index.

    .. math::
        d_{ij} = \operatorname{popcount}(q_i \oplus c_j)

    Args:
        queries: packed codes, ``(N, W)`` uint8, 8 bits in a byte (``weft.pack_bits``), any strides.
        database: packed codes, ``(M, W)`` uint8, any strides.
        k: how many, >= 1; it may exceed M.

    Returns:
        A named tuple: ``distances`` ``(N, k)`` int32, ascending, and ``indices`` ``(N, k)`` int64.
        Where M < k, rows end in distances of 2^31 - 1 with index -1. The matrix of all distances is
        not stored.

    Raises:
        ValueError: shapes or devices that do not match, k < 1.
        TypeError: codes that are not uint8, k that is not an integer.

    Source: Hamming, "Error detecting and error correcting codes", Bell System Technical Journal
    1950; as search of binary embeddings: Norouzi et al., "Hamming distance metric learning",
    NeurIPS 2012.
    """
    for name, codes in (("queries", queries), ("database", database)):
        if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
            kind = getattr(codes, "dtype", type(codes).__name__)
            raise TypeError(f"{name} must be a uint8 tensor of packed bits, got {kind}")
        if codes.dim() != 2:
            raise ValueError(f"{name} must be 2-d, one code in a row, got {tuple(codes.shape)}")
    if database.shape[1] != queries.shape[1] or database.device != queries.device:
        raise ValueError(
            f"database must have codes of {queries.shape[1]} bytes on {queries.device}, "
            f"got {database.shape[1]} on {database.device}"
        )
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    return HammingTopK(*search(queries.contiguous(), database.contiguous(), k))


def _fake(queries, database, k):
    N = queries.shape[0]
    return queries.new_empty(N, k, dtype=torch.int32), queries.new_empty(N, k, dtype=torch.int64)


def _reference(queries, database, k):
    return formula.hamming_topk(queries, database, k)


def _refuses_on_triton(queries, database, k) -> str | None:
    return None if k <= MOST_ON_TRITON else f"k = {k} > {MOST_ON_TRITON}"


search = Op(
    "hamming_topk",
    "(Tensor queries, Tensor database, SymInt k) -> (Tensor distances, Tensor indices)",
    family="pairwise",
    fake=_fake,
    implementations=[
        cpu("hamming_topk", dtypes=CODES),
        triton("pairwise.hamming_topk", "hamming_topk", _refuses_on_triton, CODES),
        reference(_reference),
    ],
)
register_no_gradient(search, "distances of codes are integers")
