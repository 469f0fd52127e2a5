"""Launchers of attention's backward: rows first, then the gradients that are wanted."""

import torch
import triton
from torch import Tensor

from weft.triton_kernels.attention.attention import PROGRAMS, parts_of
from weft.triton_kernels.attention.backward import Upstream, rows_kernel
from weft.triton_kernels.attention.backward_bias import grad_bias_kernel
from weft.triton_kernels.attention.backward_tokens import grad_keys_kernel, grad_query_kernel
from weft.triton_kernels.attention.call import COUNT, Call, broadcast_strides, call_of
from weft.triton_kernels.attention.rules import Rules
from weft.triton_kernels.attention.sdpa import sdpa_applies, sdpa_backward
from weft.triton_kernels.common import Config, launch


def _tiles(m: int, n: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n}


# (architecture, precision, whether keys own the sums, size of a head)
TABLE = {
    (80, "half", False, 64): Config(_tiles(64, 64), num_warps=8, num_stages=1),
    (80, "half", False, 128): Config(_tiles(64, 64), num_warps=8, num_stages=1),
    (80, "half", True, 64): Config(_tiles(64, 64), num_warps=8, num_stages=1),
    (80, "half", True, 128): Config(_tiles(16, 64), num_warps=8, num_stages=1),
    (80, "float", False, 64): Config(_tiles(32, 32), num_warps=4, num_stages=1),
    (80, "float", False, 128): Config(_tiles(32, 32), num_warps=8, num_stages=1),
    (80, "float", True, 64): Config(_tiles(32, 32), num_warps=4, num_stages=1),
    (80, "float", True, 128): Config(_tiles(16, 32), num_warps=8, num_stages=1),
    (90, "half", False, 64): Config(_tiles(64, 64), num_warps=8, num_stages=1),
    (90, "half", False, 128): Config(_tiles(64, 64), num_warps=8, num_stages=1),
    (90, "half", True, 64): Config(_tiles(64, 64), num_warps=8, num_stages=1),
    (90, "half", True, 128): Config(_tiles(16, 64), num_warps=8, num_stages=1),
    (90, "float", False, 64): Config(_tiles(64, 64), num_warps=8, num_stages=1),
    (90, "float", False, 128): Config(_tiles(32, 32), num_warps=8, num_stages=1),
    (90, "float", True, 64): Config(_tiles(64, 64), num_warps=8, num_stages=1),
    (90, "float", True, 128): Config(_tiles(16, 32), num_warps=8, num_stages=1),
}
QUERY, KEY, VALUE, BIAS, SINK, KEY_WEIGHT, QUERY_WEIGHT = (1 << n for n in range(7))
LARGEST_HEAD = 128  # a tile of both gradients is kept in registers
PARTS_BYTES = 16 << 20  # of the parts of a bias's gradient, beyond the first


def attention_backward(*arguments) -> tuple[Tensor, ...]:
    """Of the op: the seven gradients, empty where not wanted."""
    grad_out, grad_lse, grad_sums, out, lse, _, wanted = arguments[COUNT:]
    query = arguments[0]
    grads = [query.new_empty(0) for _ in range(7)]
    if sdpa_applies(*arguments) and grad_out is not None:
        grads[:3] = sdpa_backward(*arguments)
        return tuple(g if wanted >> n & 1 else g.new_empty(0) for n, g in enumerate(grads))
    call = call_of(*arguments[:COUNT])
    B, H, Nq, Nk = call.sizes
    for n, t in enumerate(arguments[:7]):
        if wanted >> n & 1:
            shape = (t.shape[0], t.shape[2], t.shape[1], t.shape[3]) if n < 3 else t.shape
            grads[n] = t.new_zeros(shape) if B * H * Nq * Nk == 0 else t.new_empty(shape)
    if B * H * Nq * Nk == 0:
        return tuple(grads)
    rows = lambda: query.new_empty(B, H, Nq, dtype=torch.float32)  # noqa: E731
    contiguous = lambda t: None if t is None else t.contiguous()  # noqa: E731
    strides = None
    if grad_out is not None:
        strides = tuple(broadcast_strides(grad_out)[n] for n in (0, 2, 1, 3))
    sweep = query.dtype == torch.float32  # in half precision the roundings of P and dS count more
    share = rows() if sweep or call.args.sink is not None else None
    of_lse = None if grad_lse is None else rows()
    up = Upstream(grad_out, strides, contiguous(grad_sums), lse.contiguous(), share, rows(), of_lse)
    of_sink = rows() if wanted & SINK else None
    received = rows() if wanted & QUERY_WEIGHT and grad_sums is not None else None
    config = call.config(TABLE, False)
    launch(
        rows_kernel,
        (triton.cdiv(Nq, config.tiles["BLOCK_M"]) * B * H,),
        config,
        *(query, call.args, call.rules, up, out.contiguous(), contiguous(grad_lse)),
        *(of_sink, received),
        matrix_product=call.matrix_product(config) and (sweep or grad_sums is not None),
        **call.head,
        PRECISION=call.precision,
        SWEEP=sweep,
    )
    if wanted & QUERY:
        _query(call, up, grads[0])
    if wanted & (KEY | VALUE | KEY_WEIGHT):
        _keys(call, up, grads, wanted)
    if wanted & BIAS:
        _bias(call, up, grads[3])
    if of_sink is not None:
        torch.sum(of_sink, (0, 2), out=grads[4])
    if wanted & QUERY_WEIGHT:
        _over_heads(received, grads[6])
    return tuple(grads)


def _over_heads(t: Tensor | None, grad: Tensor) -> None:
    """(B, H, N) summed to (B, 1 or H, N); None is 0."""
    if t is None:
        grad.zero_()
    elif grad.shape[1] == t.shape[1]:
        grad.copy_(t)
    else:
        torch.sum(t, 1, keepdim=True, out=grad)


def _query(call: Call, up: Upstream, grad: Tensor) -> None:
    B, H, Nq, Nk = call.sizes
    config = call.config(TABLE, False)
    programs = triton.cdiv(Nq, config.tiles["BLOCK_M"]) * B * H
    parts, width = parts_of(programs, Nk, config.tiles["BLOCK_N"])
    result = grad
    if parts > 1:
        result = grad.new_empty(parts, *grad.shape, dtype=torch.float32)
    launch(
        grad_query_kernel,
        (programs * parts,),
        config,
        *(call.query, call.args, call.rules, up, result, width, parts),
        matrix_product=call.matrix_product(config),
        **call.head,
        PRECISION=call.precision,
    )
    if parts > 1:
        grad.copy_(result.sum(0))


def _keys(call: Call, up: Upstream, grads: list[Tensor], wanted: int) -> None:
    B, H, _, Nk = call.sizes
    heads = call.key.shape[1]
    config = call.config(TABLE, True)
    to = [
        grads[n] if wanted >> n & 1 else t.new_empty(B, Nk, heads, t.shape[3])
        for n, t in ((1, call.key), (2, call.value))
    ]
    of_weight = None
    if wanted & KEY_WEIGHT:
        of_weight = call.query.new_empty(B, H, Nk, dtype=torch.float32)
    launch(
        grad_keys_kernel,
        (triton.cdiv(Nk, config.tiles["BLOCK_N"]) * B * heads,),
        config,
        *(call.query, call.args, call.rules, up, *to, of_weight),
        matrix_product=call.matrix_product(config),
        **call.head,
        PRECISION=call.precision,
    )
    if wanted & KEY_WEIGHT:
        _over_heads(of_weight, grads[5])


def slices_of(programs: int, total: int, numel: int) -> tuple[int, int]:
    """(slices, tiles of each) that the sum over ``total`` tiles is cut into, by shape alone."""
    most = 1 + PARTS_BYTES // (4 * numel)
    slices = max(1, min(total, triton.cdiv(2 * PROGRAMS, programs), most))
    length = triton.cdiv(total, slices)
    return triton.cdiv(total, length), length


def _bias(call: Call, up: Upstream, grad: Tensor) -> None:
    B, H, Nq, Nk = call.sizes
    config = call.config(TABLE, False)
    planes = tuple(grad.shape[:2])
    tiles = (triton.cdiv(Nq, config.tiles["BLOCK_M"]), triton.cdiv(Nk, config.tiles["BLOCK_N"]))
    own, summed = 1, (B // planes[0]) * (H // planes[1])
    for n, count in zip(grad.shape[2:], tiles, strict=True):
        own, summed = (own * count, summed) if n > 1 else (own, summed * count)
    programs = own * planes[0] * planes[1]
    slices, length = slices_of(programs, summed, grad.numel())
    parts = grad.new_empty(slices, *grad.shape, dtype=torch.float32)
    launch(
        grad_bias_kernel,
        (programs * slices,),
        config,
        *(call.query, call.args, call.rules, up, parts, planes, length),
        matrix_product=call.matrix_product(config),
        **call.head,
        ROWS=grad.shape[2] > 1,
        COLUMNS=grad.shape[3] > 1,
        SKIP=call.rules != Rules() and Nk > 2 * config.tiles["BLOCK_N"],
        PRECISION=call.precision,
    )
    grad.copy_(parts.sum(0))
