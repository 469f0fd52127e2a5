"""Launchers of attention: which kernels run, in which tiles; `forward` and `backward` have them.

Long and plain heads of 64 and 128 in half precision on a GPU go to PyTorch's own kernels.
"""

import torch
import triton
from torch import Tensor

from weft.triton_kernels.attention.call import COUNT, Call, call_of
from weft.triton_kernels.attention.forward import forward_kernel, merge_kernel
from weft.triton_kernels.attention.key_sums import key_sums_kernel
from weft.triton_kernels.attention.sdpa import sdpa_applies, sdpa_forward
from weft.triton_kernels.common import Config, launch


def _tiles(m: int, n: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n}


# (architecture, precision, kind, size of a head)
TABLE = {
    (80, "half", "plain", 64): Config(_tiles(128, 64), num_warps=4, num_stages=3),
    (80, "half", "plain", 128): Config(_tiles(64, 64), num_warps=4, num_stages=2),
    (80, "half", "plain", 256): Config(_tiles(64, 32), num_warps=4, num_stages=1),
    (80, "half", "rich", 64): Config(_tiles(64, 64), num_warps=4, num_stages=2),
    (80, "half", "rich", 128): Config(_tiles(64, 64), num_warps=8, num_stages=2),
    (80, "half", "rich", 256): Config(_tiles(64, 32), num_warps=8, num_stages=1),
    (80, "half", "labels", 64): Config(_tiles(64, 64), num_warps=8, num_stages=2),
    (80, "half", "labels", 128): Config(_tiles(64, 64), num_warps=8, num_stages=2),
    (80, "half", "labels", 256): Config(_tiles(64, 32), num_warps=8, num_stages=1),
    (80, "float", "plain", 64): Config(_tiles(64, 32), num_warps=4, num_stages=2),
    (80, "float", "plain", 128): Config(_tiles(32, 32), num_warps=4, num_stages=2),
    (80, "float", "plain", 256): Config(_tiles(16, 32), num_warps=4, num_stages=1),
    (80, "float", "rich", 64): Config(_tiles(64, 32), num_warps=8, num_stages=2),
    (80, "float", "labels", 64): Config(_tiles(64, 32), num_warps=8, num_stages=2),
    (80, "float", "rich", 128): Config(_tiles(32, 32), num_warps=8, num_stages=2),
    (80, "float", "labels", 128): Config(_tiles(32, 32), num_warps=8, num_stages=2),
    (80, "float", "rich", 256): Config(_tiles(16, 32), num_warps=8, num_stages=1),
    (80, "float", "labels", 256): Config(_tiles(16, 32), num_warps=8, num_stages=1),
    (90, "half", "plain", 64): Config(_tiles(128, 64), num_warps=8, num_stages=3),
    (90, "half", "plain", 128): Config(_tiles(128, 64), num_warps=8, num_stages=3),
    (90, "half", "plain", 256): Config(_tiles(64, 64), num_warps=8, num_stages=2),
    (90, "half", "rich", 64): Config(_tiles(64, 64), num_warps=4, num_stages=2),
    (90, "half", "rich", 128): Config(_tiles(64, 64), num_warps=8, num_stages=2),
    (90, "half", "rich", 256): Config(_tiles(64, 32), num_warps=8, num_stages=2),
    (90, "half", "labels", 64): Config(_tiles(64, 32), num_warps=4, num_stages=3),
    (90, "half", "labels", 128): Config(_tiles(64, 32), num_warps=4, num_stages=2),
    (90, "half", "labels", 256): Config(_tiles(64, 32), num_warps=8, num_stages=2),
    (90, "float", "plain", 64): Config(_tiles(64, 64), num_warps=8, num_stages=2),
    (90, "float", "plain", 128): Config(_tiles(64, 32), num_warps=8, num_stages=2),
    (90, "float", "plain", 256): Config(_tiles(32, 32), num_warps=8, num_stages=1),
    (90, "float", "rich", 64): Config(_tiles(64, 64), num_warps=8, num_stages=2),
    (90, "float", "labels", 64): Config(_tiles(64, 32), num_warps=8, num_stages=2),
    (90, "float", "rich", 128): Config(_tiles(64, 32), num_warps=8, num_stages=2),
    (90, "float", "labels", 128): Config(_tiles(64, 32), num_warps=8, num_stages=1),
    (90, "float", "rich", 256): Config(_tiles(32, 32), num_warps=8, num_stages=1),
    (90, "float", "labels", 256): Config(_tiles(32, 32), num_warps=8, num_stages=1),
}
MERGE = Config({"BLOCK_M": 16}, num_warps=4)
PROGRAMS = 264  # two for each multiprocessor
KEYS_OF_PART = 512  # at least


def attention(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the op: out (B, Nq, H, Dv), lse (B, H, Nq), key sums (B, H, Nk) or empty, normalizer."""
    query, _, value = arguments[:3]
    wide = {"dtype": torch.float32}
    if sdpa_applies(*arguments):
        out, lse = sdpa_forward(*arguments)
        return out, lse, query.new_empty(0, **wide), _normalizer(lse)
    call = call_of(*arguments[:COUNT])
    B, H, Nq, Nk = call.sizes
    out = query.new_empty(B, Nq, H, value.shape[3])
    lse = query.new_empty(B, H, Nq, **wide)
    if B * H * Nq:
        _forward(call, out, lse)
    sums = query.new_empty((B, H, Nk) if arguments[COUNT] else (0,), **wide)
    if sums.numel():
        _key_sums(call, lse, sums)
    return out, lse, sums, _normalizer(lse)


def _normalizer(lse: Tensor) -> Tensor:
    """(B, H, 2, Nq): m and Σ_j u_j exp(S_ij − m_i) with m = lse; the backward here reads lse."""
    empty = lse == -torch.inf
    return torch.stack([lse.masked_fill(empty, 0), (~empty).to(lse.dtype)], 2)


def parts_of(programs: int, Nk: int, BLOCK_N: int) -> tuple[int, int]:
    """(parts that the keys are cut into, keys of each): by the shape alone, so results repeat."""
    parts = max(1, min(PROGRAMS // programs, Nk // KEYS_OF_PART))
    width = triton.cdiv(triton.cdiv(max(Nk, 1), parts), BLOCK_N) * BLOCK_N
    return triton.cdiv(max(Nk, 1), width), width


def _forward(call: Call, out: Tensor, lse: Tensor) -> None:
    B, H, Nq, Nk = call.sizes
    config = call.config(TABLE, "rich" if call.kind == "plain" and Nq <= 64 else call.kind)
    programs = triton.cdiv(Nq, config.tiles["BLOCK_M"]) * B * H
    parts, width = parts_of(programs, Nk, config.tiles["BLOCK_N"])
    results = (out, lse)
    if parts > 1:
        new = lambda t: t.new_empty(parts * B, *t.shape[1:], dtype=torch.float32)  # noqa: E731
        results = (new(out), new(lse))
    launch(
        forward_kernel,
        (programs * parts,),
        config,
        *(call.query, call.args, call.rules, *results, width, parts),
        matrix_product=call.matrix_product(config),
        **call.head,
        PRECISION=call.precision,
        SPLIT=parts > 1,
    )
    if parts > 1:
        heads = {name: size for name, size in call.head.items() if name in ("Dv", "BLOCK_V")}
        grid = (triton.cdiv(Nq, MERGE.tiles["BLOCK_M"]) * B * H,)
        launch(merge_kernel, grid, MERGE, *results, call.args, out, lse, parts, **heads)


def _key_sums(call: Call, lse: Tensor, sums: Tensor) -> None:
    B, H, _, Nk = call.sizes
    config = call.config(TABLE, "rich" if call.kind == "plain" else call.kind)
    heads = {name: size for name, size in call.head.items() if name in ("D", "BLOCK_D")}
    launch(
        key_sums_kernel,
        (triton.cdiv(Nk, config.tiles["BLOCK_N"]) * B * H,),
        config,
        *(call.query, call.args, call.rules, lse, sums),
        matrix_product=call.matrix_product(config),
        **heads,
        PRECISION=call.precision,
    )
