"""Masks packed into bits; weft.reference.attention.masks has the format and the programs.

Every rule of a program is packed by itself, a tile of 64 × 64 for each program of a grid. ``&``,
``|`` and ``~`` then act on words, 64 pairs at once, and a last pass finds the states of tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.attention.lowering import arguments_of_rules, rules_of
from weft.triton_kernels.attention.rules import Rules, limits, of_keys, of_queries, visible
from weft.triton_kernels.common import Config, launch

WORD = 64
CONFIG = Config({"BLOCK": WORD}, num_warps=4)


class Matrix(NamedTuple):
    """A rule that is a bool tensor (batches, heads, ·, ·), of blocks of ``edges`` pairs."""

    pointer: object = None
    planes: object = (1, 1)
    strides: object = (0, 0, 0, 0)
    edges: object = (1, 1)


@triton.jit
def pack_kernel(words, rules, matrix, batches, heads, Nq, Nk, BLOCK: tl.constexpr):
    """words (batches, heads, Nq, ⌈Nk / 64⌉)."""
    columns = tl.cdiv(Nk, BLOCK)
    tiles = tl.cdiv(Nq, BLOCK)
    word = tl.program_id(0) % columns
    i = tl.program_id(0) // columns % tiles * BLOCK + tl.arange(0, BLOCK)
    own = tl.program_id(0) // columns // tiles
    b, h = own // heads, own % heads
    j0 = word * BLOCK
    j = j0 + tl.arange(0, BLOCK)
    query_stop, key_stop = limits(rules, b, Nq, Nk)
    queries = of_queries(rules, b, h, i, Nq, query_stop)
    keys = of_keys(rules, b, h, j, Nk, key_stop)
    see = visible(rules, i, j, j0, queries, keys, Nk)
    if matrix.pointer is not None:
        at = matrix.pointer + (b % matrix.planes[0]).to(tl.int64) * matrix.strides[0]
        at += (h % matrix.planes[1]).to(tl.int64) * matrix.strides[1]
        row = (i // matrix.edges[0]).to(tl.int64) * matrix.strides[2]
        column = (j // matrix.edges[1]).to(tl.int64) * matrix.strides[3]
        see &= tl.load(at + row[:, None] + column[None, :], mask=see, other=0).to(tl.int1)
    place = tl.full([BLOCK], 1, tl.int64) << tl.arange(0, BLOCK).to(tl.int64)
    packed = tl.sum(tl.where(see, place[None, :], 0), 1)
    tl.store(words + (own.to(tl.int64) * Nq + i) * columns + word, packed, mask=i < Nq)


@triton.jit
def states_kernel(words, states, Nq, Nk, BLOCK: tl.constexpr):
    """states (planes, ⌈Nq / 64⌉, ⌈Nk / 64⌉) of words (planes, Nq, ⌈Nk / 64⌉)."""
    columns = tl.cdiv(Nk, BLOCK)
    tiles = tl.cdiv(Nq, BLOCK)
    word = tl.program_id(0) % columns
    i = tl.program_id(0) // columns % tiles * BLOCK + tl.arange(0, BLOCK)
    own = (tl.program_id(0) // columns // tiles).to(tl.int64)
    found = tl.load(words + (own * Nq + i) * columns + word, mask=i < Nq, other=0)
    left = tl.minimum(Nk - word * BLOCK, BLOCK).to(tl.int64)
    all_ones = tl.full([], -1, tl.int64)
    whole = tl.where(left == BLOCK, all_ones, (1 << (left % BLOCK)) - 1)
    some = tl.max((found != 0).to(tl.int32), 0)
    every = tl.min(((found == whole) | (i >= Nq)).to(tl.int32), 0)
    tl.store(states + tl.program_id(0).to(tl.int64), (some + every).to(tl.uint8))


def mask_plan(
    like: Tensor, program: str, ints: list[int], tensors: list[Tensor], B: int, H: int, Nq: int,
    Nk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of the op: (words, states)."""
    rules = list(arguments_of_rules(program, ints, tensors))
    planes = [
        _different([t.shape[0] for t in tensors], B),
        _different([t.shape[1] for t in tensors if t.dim() > 2], H),
    ]
    shared = all(name in ("dense", "key_lengths") for name, *_ in rules)
    if shared and all(t.shape[2] == 1 for t in tensors if t.dim() == 4):
        Nq = 1
    given = iter(rules)
    stack: list[Tensor] = []
    for token in program.split():
        if token == "~":
            stack.append(~stack.pop() & _existing(Nk, like.device))
        elif token in "&|":
            right, left = stack.pop(), stack.pop()
            stack.append(left & right if token == "&" else left | right)
        else:
            stack.append(_packed(like, *next(given), (*planes, Nq, Nk)))
    (words,) = stack
    tiles, columns = triton.cdiv(Nq, WORD), triton.cdiv(Nk, WORD)
    states = torch.empty(*planes, tiles, columns, dtype=torch.uint8, device=like.device)
    if states.numel():
        launch(states_kernel, (states.numel(),), CONFIG, words, states, Nq, Nk, BLOCK=WORD)
    return words, states


def _different(sizes: list[int], n: int) -> int:
    """Planes that take turns together: as many as the most, if the others divide it."""
    most = max(sizes, default=1)
    return most if all(size and most % size == 0 for size in sizes) else n


def _existing(Nk: int, device: torch.device) -> Tensor:
    """Words with a bit for every key that there is."""
    words = torch.full((triton.cdiv(Nk, WORD),), -1, dtype=torch.int64, device=device)
    if Nk % WORD:
        words[-1] = (1 << Nk % WORD) - 1
    return words


def _packed(like: Tensor, rule: str, ints: list, tensors: list, sizes: tuple) -> Tensor:
    B, H, Nq, Nk = sizes
    columns = triton.cdiv(Nk, WORD)
    words = torch.empty(B, H, Nq, columns, dtype=torch.int64, device=like.device)
    rules, matrix = Rules(), Matrix()
    if rule in ("dense", "blocks"):
        x = tensors[0]
        rows, keys = (1, 1) if rule == "dense" else ints
        strides = [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
        matrix = Matrix(x, tuple(x.shape[:2]), tuple(strides), (rows, keys))
    else:
        rules = rules_of(rule, ints, tensors, like, sizes)
    if words.numel():
        grid = (B * H * triton.cdiv(Nq, WORD) * columns,)
        launch(pack_kernel, grid, CONFIG, words, rules, matrix, B, H, Nq, Nk, BLOCK=WORD)
    return words


def example_launches(dtype: torch.dtype) -> None:
    """A dense mask for each image, and documents that see each other or their neighbours."""
    make = lambda *shape, **kind: torch.empty(*shape, device="meta", **kind)  # noqa: E731
    dense, ids = make(8, 1, 100, 4096, dtype=torch.bool), make(1, 1, 4096, dtype=torch.int64)
    mask_plan(dense, "dense", [], [dense], 8, 8, 100, 4096)
    mask_plan(ids, "segments band | ~", [-9, 9], [ids, ids], 1, 8, 4096, 4096)
    words, states = mask_plan(dense, "dense", [], [dense], 8, 8, 100, 4096)
    mask_plan(words, "bits neighborhood &", [1, 4096, 7, 1], [words, states], 8, 8, 4096, 4096)
