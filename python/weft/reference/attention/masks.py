r"""Which keys a query sees: a small postfix program over rules, evaluated to a bool matrix.

A program is a string of tokens separated by spaces; the empty one allows everything. A rule takes
its integers and tensors from the two lists that come with the program, in order:

    band lo hi                     lo ≤ j − i ≤ hi
    band_rows lo hi, shift         lo + shift_bi ≤ j − i ≤ hi + shift_bi       shift (B', Nq) int64
    query_lengths, length          i < length_b                                (B',) int64
    key_lengths, length            j < length_b                                (B',) int64
    segments, query_ids, key_ids   query_id_bhi = key_id_bhj                   (B', H', N) int64
    neighborhood n, shape × n, kernel × n, dilation × n                        see ``neighborhood``
    blocks block_q block_k, x      x_bh[i / block_q, j / block_k]              (B', H', ·, ·) bool
    dense, x                       x_bhij                     (B', H', Nq or 1, Nk or 1) bool
    bits, words, states            bit j mod 64 of words_bhi[j / 64], see ``pack``

and ``&``, ``|`` (two operands) and ``~`` (one) join what came before. Tensors are shared by the
batches b ≡ b' mod B', and by the heads h ≡ h' mod H'.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNBOUNDED = 1 << 40  # an end of a band that no index reaches
WORD = 64  # keys of a packed word, and queries and keys of a tile whose state is known
EMPTY, PARTIAL, FULL = 0, 1, 2

# How many integers and tensors a rule takes; a neighborhood's integers follow its first.
RULES = {
    "band": (2, 0),
    "band_rows": (2, 1),
    "query_lengths": (0, 1),
    "key_lengths": (0, 1),
    "segments": (0, 2),
    "neighborhood": (None, 0),
    "blocks": (2, 1),
    "dense": (0, 1),
    "bits": (0, 2),
}


@dataclass(frozen=True)
class MaskProgram:
    """A mask as an op takes it: the last three arguments of its schema that speak of masks."""

    program: str = ""
    ints: Sequence[int] = ()
    tensors: Sequence[Tensor] = ()

    def __iter__(self):
        return iter((self.program, list(self.ints), list(self.tensors)))


def allowed_pairs(
    mask: MaskProgram,
    B: int,
    H: int,
    Nq: int,
    Nk: int,
    device: torch.device,
    first: int = 0,
    count: int | None = None,
) -> Tensor | None:
    """Queries [first, first + count): (B or 1, H or 1, count, Nk) bool; None: all is visible."""
    if not mask.program:
        return None
    count = Nq if count is None else count
    rows = slice(first, first + count)
    i = torch.arange(Nq, device=device)[rows, None]
    j = torch.arange(Nk, device=device)
    ints, tensors = iter(mask.ints), iter(mask.tensors)
    rule = lambda name: _rule(name, ints, tensors, i, j, rows, Nq, B, H)  # noqa: E731
    stack: list[Tensor] = []
    for token in mask.program.split():
        if token == "~":
            stack.append(~stack.pop())
        elif token in "&|":
            right, left = stack.pop(), stack.pop()
            stack.append(left & right if token == "&" else left | right)
        else:
            stack.append(rule(token))
    (allowed,) = stack
    return allowed.expand(*allowed.shape[:2], count, Nk)


def _rule(
    rule: str, ints, tensors, i: Tensor, j: Tensor, rows: slice, Nq: int, B: int, H: int
) -> Tensor:
    """(B or 1, H or 1, rows or 1, Nk or 1) of one rule."""
    repeated = lambda t: _repeat(t, B, H)  # noqa: E731
    if rule == "band":
        low, high = next(ints), next(ints)
        return ((low <= j - i) & (j - i <= high))[None, None]
    if rule == "band_rows":
        low, high, shift = next(ints), next(ints), repeated(next(tensors)[:, None, rows, None])
        return (low + shift <= j - i) & (j - i <= high + shift)
    if rule == "query_lengths":
        return i < repeated(next(tensors)[:, None, None, None])
    if rule == "key_lengths":
        return j < repeated(next(tensors)[:, None, None, None])
    if rule == "segments":
        query_ids, key_ids = next(tensors)[:, :, rows, None], next(tensors)[:, :, None]
        return repeated(query_ids) == repeated(key_ids)
    if rule == "neighborhood":
        n = next(ints)
        shape, kernel, dilation = ([next(ints) for _ in range(n)] for _ in range(3))
        return neighborhood(i, j, shape, kernel, dilation)[None, None]
    if rule == "blocks":
        block_q, block_k = next(ints), next(ints)
        return repeated(next(tensors)[:, :, i // block_q, j // block_k])
    if rule == "dense":
        x = next(tensors)
        return repeated(x[:, :, rows] if x.shape[2] != 1 or Nq == 1 else x)
    if rule == "bits":
        words, _ = next(tensors), next(tensors)
        words = words[:, :, rows] if words.shape[2] != 1 or Nq == 1 else words
        return repeated(unpack(words, j.shape[0]))
    raise ValueError(f"mask_program has no rule {rule!r}")


def _repeat(t: Tensor, B: int, H: int) -> Tensor:
    """(B or 1, H or 1, ...): batches and heads take turns at what there is less of."""
    batches = B // t.shape[0] if t.shape[0] > 1 else 1
    heads = H // t.shape[1] if t.shape[1] > 1 else 1
    return t if batches == heads == 1 else t.repeat(batches, heads, *[1] * (t.dim() - 2))


def neighborhood(i: Tensor, j: Tensor, shape: list, kernel: list, dilation: list) -> Tensor:
    r"""Hassani et al., "Neighborhood Attention Transformer": every query sees ``kernel`` keys along
    each axis of the grid, those around it, or at a border the nearest ones that there are; with
    dilation, among the positions of its own residue. For one axis of length L, position
    :math:`p = d c + r` is the c-th of the :math:`L_r = \lceil (L - r) / d \rceil` of residue r and

    .. math:: \text{sees } d c' + r, \quad s \le c' < s + k,
        \qquad s = \mathrm{clamp}(c - \lfloor k / 2 \rfloor, 0, L_r - k)
    """
    allowed, stride = None, 1
    for L, k, d in reversed(list(zip(shape, kernel, dilation, strict=True))):
        p, other = i // stride % L, j // stride % L
        residue = p % d
        last = (L - residue + d - 1) // d - k
        start = torch.minimum((p // d - k // 2).clamp_min(0), last)
        along = (other % d == residue) & (other // d >= start) & (other // d < start + k)
        allowed = along if allowed is None else allowed & along
        stride *= L
    return allowed


def pack(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """A mask of (B', H', Nq or 1, Nk) bool in packed form.

    words: (B', H', Nq or 1, ⌈Nk / 64⌉) int64, bit c of word w for key 64 w + c, 0 beyond the keys.
    states: (B', H', ⌈Nq / 64⌉, ⌈Nk / 64⌉) uint8, of tiles of 64 queries × 64 keys: 0 empty,
    1 partial, 2 full (all pairs of the tile that exist).
    """
    Nq, Nk = allowed.shape[-2:]
    bits = F.pad(allowed, (0, -Nk % WORD)).unflatten(-1, (-1, WORD))
    place = torch.ones(WORD, dtype=torch.int64, device=allowed.device) << torch.arange(
        WORD, device=allowed.device
    )
    words = torch.where(bits, place, 0).sum(-1)

    def of_tiles(padding: bool, pool: str) -> Tensor:
        whole = F.pad(allowed, (0, -Nk % WORD, 0, -Nq % WORD), value=padding)
        tiles = whole.unflatten(-1, (-1, WORD)).unflatten(-3, (-1, WORD))
        return getattr(getattr(tiles, pool)(-1), pool)(-2)

    some, every = of_tiles(False, "any"), of_tiles(True, "all")
    return words, some.to(torch.uint8) + every.to(torch.uint8)


def unpack(words: Tensor, Nk: int) -> Tensor:
    """The (..., Nk) bool matrix of packed words (..., ⌈Nk / 64⌉)."""
    places = torch.arange(WORD, device=words.device)
    bits = (words[..., None] >> places) & 1
    return bits.flatten(-2)[..., :Nk].bool()


def mask_plan(mask: MaskProgram, B: int, H: int, Nq: int, Nk: int, device) -> tuple[Tensor, Tensor]:
    """The packed form of a program, with as many planes and rows as its tensors tell apart."""
    allowed = allowed_pairs(mask, B, H, 1 if one_row(mask) else Nq, Nk, device)
    planes = plan_planes(mask, B, H)
    return pack(allowed[: planes[0], : planes[1]])


def plan_planes(mask: MaskProgram, B: int, H: int) -> tuple[int, int]:
    """How many batches and heads of a mask are different."""

    def different(sizes: list[int], n: int) -> int:
        most = max(sizes, default=1)
        return most if all(size and most % size == 0 for size in sizes) else n

    batches = different([t.shape[0] for t in mask.tensors], B)
    return batches, different([t.shape[1] for t in mask.tensors if t.dim() > 2], H)


def one_row(mask: MaskProgram) -> bool:
    """Whether every query sees the same keys, as far as the shapes tell."""
    rules = [token for token in mask.program.split() if token in RULES]
    shared = all(rule in ("dense", "key_lengths") for rule in rules)
    return shared and all(t.shape[2] == 1 for t in mask.tensors if t.dim() == 4)
