"""Attention of packed sequences of different lengths."""

import torch
from torch import Tensor

from weft.masks import Causal, Mask, Segments, Window
from weft.ops.attention.attention import attention
from weft.ops.checks import check_float, values_are_checked
from weft.reference.attention.masks import MaskProgram


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query_length: int,
    max_key_length: int,
    *,
    mask: Causal | Window | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    key_weight: Tensor | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_key_sums: bool = False,
    query_weight: Tensor | None = None,
    softcap: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""``weft.attention`` of S sequences packed one after the other, each on its own.

    Sequence s has the queries ``query_offsets[s] ≤ i < query_offsets[s + 1]`` and the keys
    ``key_offsets[s] ≤ j < key_offsets[s + 1]``; tiles of two sequences are never multiplied. Tokens
    before the first offset and from the last one on belong to no sequence: their output is 0.

    Args:
        query: ``(Tq, H, D)``. key: ``(Tk, Hkv, D)``. value: ``(Tk, Hkv, Dv)``. Any strides.
        query_offsets, key_offsets: ``(S + 1,)`` int64 or int32, not decreasing.
        max_query_length, max_key_length: at least the longest lengths.
        mask: ``weft.masks.Causal`` or ``Window`` within each sequence, positions counted from its
            start; None: all its keys.
        key_weight: ``(1 or H, Tk)``. query_weight: ``(1 or H, Tq)``.
        scale, sink, enable_gqa, dropout_p, softcap, seed, return_lse, return_key_sums: as in
            ``weft.attention``.

    Returns:
        ``(Tq, H, Dv)``; with it, as asked, lse ``(H, Tq)`` and key sums ``(H, Tk)``.

    Raises:
        ValueError: as ``weft.attention``; offsets that decrease, are out of range or longer than
            the lengths given (on the CPU; on a GPU with ``weft.check_values(True)``).
        TypeError: as ``weft.attention``; a mask of another kind.

    Source: the packed form of Dao, "FlashAttention-2", 2023, with its offsets.
    """
    check_float(query=query, key=key, value=value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 3:
            raise ValueError(f"{name} must be (tokens, H, D), got {tuple(t.shape)}")
    S = query_offsets.shape[0] if isinstance(query_offsets, Tensor) else 0
    offsets = (query_offsets, key_offsets)
    sizes = (query.shape[0], key.shape[0])
    longest = (max_query_length, max_key_length)
    for name, o, n, most in zip(("query", "key"), offsets, sizes, longest, strict=True):
        _check_offsets(name, o, S, n, most, query.device)
    if mask is not None and not isinstance(mask, (Causal, Window)):
        raise TypeError(f"mask must be a Causal, a Window or None, got {type(mask).__name__}")
    ids = [_sequence_of(o, n) for o, n in zip(offsets, sizes, strict=True)]
    inside: Mask = Segments(torch.where(ids[0] < 0, -2, ids[0]), ids[1])
    if mask is not None:
        inside = inside & _Shifted(mask, _shift(*offsets, ids[0]))
    tokens = (t.transpose(0, 1)[None] for t in (query, key, value))
    weight = lambda w: None if w is None else w[None]  # noqa: E731
    results = attention(
        *tokens,
        mask=inside,
        scale=scale,
        sink=sink,
        key_weight=weight(key_weight),
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        return_lse=return_lse,
        return_key_sums=return_key_sums,
        query_weight=weight(query_weight),
        softcap=softcap,
        seed=seed,
    )
    if isinstance(results, Tensor):
        return results[0].transpose(0, 1)
    out, *rest = results
    return (out[0].transpose(0, 1), *(t[0] for t in rest))


class _Shifted(Mask):
    """A band whose diagonal each query shifts: keys of its own sequence begin elsewhere."""

    __init_subclass__ = None

    def __init__(self, band: Causal | Window, shift: Tensor):
        self.band, self.shift = band, shift

    def program(self) -> MaskProgram:
        return MaskProgram("band_rows", self.band.program().ints, (self.shift[None],))


def _check_offsets(name: str, offsets: Tensor, S: int, n: int, most: int, device) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        got = getattr(offsets, "dtype", type(offsets).__name__)
        raise TypeError(f"{name}_offsets must be an int32 or int64 tensor, got {got}")
    if offsets.dim() != 1 or offsets.shape[0] != S or S < 1 or offsets.device != device:
        raise ValueError(
            f"{name}_offsets must be ({S or 'S + 1'},) as query_offsets, at least 1, on {device}, "
            f"got {tuple(offsets.shape)} on {offsets.device}"
        )
    if not values_are_checked(offsets):
        return
    lengths = offsets.diff()
    if bool((lengths < 0).any()):
        raise ValueError(f"{name}_offsets must not decrease: sequences would overlap")
    if int(offsets[0]) < 0 or int(offsets[-1]) > n:
        raise ValueError(
            f"{name}_offsets must be in [0, {n}], got {int(offsets[0])} to {int(offsets[-1])}"
        )
    if lengths.numel() and int(lengths.max()) > most:
        raise ValueError(
            f"max_{name}_length must be at least {int(lengths.max())}, the longest, got {most}"
        )


def _sequence_of(offsets: Tensor, n: int) -> Tensor:
    """The sequence of every token, or −1."""
    tokens = torch.arange(n, device=offsets.device, dtype=offsets.dtype)
    sequence = torch.bucketize(tokens, offsets, right=True) - 1
    return torch.where(tokens < offsets[-1], sequence, -1)


def _shift(query_offsets: Tensor, key_offsets: Tensor, sequence: Tensor) -> Tensor:
    """By how much the keys of a query's sequence begin later than its queries."""
    return (key_offsets - query_offsets).long()[sequence.clamp_min(0)]
