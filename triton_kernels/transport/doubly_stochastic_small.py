"""Doubly stochastic matrices of at most 8 x 8: a tile of whole matrices per program, whose
iterations run in registers.

Rows come first here: for rows last the matrix is read transposed. Without a stabilizer
Q_ij = u_i v_j A_ij with A_ij = exp(x_ij / epsilon − R_i − C_j), integer shifts by the largest
exponents; with stabilizer s A = a softmax(x / epsilon) + s. Then in turn

    u_i <- 1 / Σ_j A_ij v_j                        v_j <- 1 / Σ_i A_ij u_i
    u_i <- a u_i / (u_i Σ_j A_ij v_j + s)          v_j <- v_j / (v_j Σ_i A_ij u_i + s)

The backward writes u and v of every iteration to a buffer of its program, which then takes the next
tile: the buffers of all programs fit the second-level cache.
"""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch, rounded

UP_TO = 8
FORWARD = {(80,): Config({"BLOCK": 64}, num_warps=4)}
BACKWARD = {
    (80, 2): Config({"BLOCK": 64}, num_warps=4),
    (80, 4): Config({"BLOCK": 64}, num_warps=4),
    (80, 8): Config({"BLOCK": 32}, num_warps=4),
}
PROGRAMS = 528  # of the backward: four for each multiprocessor of an H100
_LEAST = tl.constexpr(1e-30)


def temperature(epsilon: float) -> tuple[float, float]:
    """1 / epsilon in two floats, both positive: a large score times a rounding error is large."""
    inverse = 1 / epsilon
    high = ctypes.c_float(inverse).value
    if high > inverse:
        high = ctypes.c_float(high * (1 - 2.0**-23)).value
    return high, (inverse - high) or high * 1e-30


@triton.jit
def nearest(y):
    """An integer; 0 for a line without entries."""
    return tl.where(y == -float("inf"), 0.0, tl.floor(y + 0.5))


@triton.jit
def _place(first, B, rows, columns, row_step, column_step, BLOCK: tl.constexpr, P: tl.constexpr):
    """Offsets (BLOCK, P, P) of entries, and which there are."""
    m = first + tl.arange(0, BLOCK).to(tl.int64)
    i, j = tl.arange(0, P), tl.arange(0, P)
    entry = i[:, None] * row_step + j[None, :] * column_step
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    at = (m * rows * columns)[:, None, None] + entry[None, :, :]
    return at, inside[None, :, :] & (m < B)[:, None, None]


@triton.jit
def _start(s, high, low, stabilizer, size, inside, STABLE: tl.constexpr):
    """A, u and v."""
    row = nearest(tl.max(s, 2) * high)
    y = s * low + (s * high - row[:, :, None])
    if STABLE:
        e = tl.exp(y)
        share = size / tl.maximum(tl.sum(e, 2), _LEAST)
        a = tl.where(inside, e * share[:, :, None] + stabilizer, 0.0)
        column = tl.sum(a, 1) * 0
    else:
        column = nearest(tl.max(y, 1))
        a = tl.exp(s * low + (s * high - (row[:, :, None] + column[:, None, :])))
    return a, row * 0 + 1, tl.exp(column)


@triton.jit
def _rows(a, u, v, stabilizer, size, STABLE: tl.constexpr):
    total = tl.sum(a * v[:, None, :], 2)
    if STABLE:
        return size * u / (u * total + stabilizer)
    return 1 / tl.where(total == 0, _LEAST, total)


@triton.jit
def _columns(a, u, v, stabilizer, STABLE: tl.constexpr):
    total = tl.sum(a * u[:, :, None], 1)
    if STABLE:
        return v / (v * total + stabilizer)
    return 1 / tl.where(total == 0, _LEAST, total)


@triton.jit
def small_kernel(
    x,
    out,
    B,
    rows,
    columns,
    row_step,
    column_step,
    iterations,
    high,
    low,
    stabilizer,
    size,
    STABLE: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at, inside = _place(first, B, rows, columns, row_step, column_step, BLOCK, P)
    s = tl.load(x + at, mask=inside, other=-float("inf")).to(tl.float32)
    a, u, v = _start(s, high, low, stabilizer, size, inside, STABLE)
    if not STABLE:
        u = _rows(a, u, v, stabilizer, size, STABLE)
    v = _columns(a, u, v, stabilizer, STABLE)
    for _ in range(1, iterations):
        u = _rows(a, u, v, stabilizer, size, STABLE)
        v = _columns(a, u, v, stabilizer, STABLE)
    q = a * u[:, :, None] * v[:, None, :]
    tl.store(out + at, rounded(q, out.dtype.element_ty), mask=inside)


@triton.jit
def small_backward_kernel(
    x,
    grad,
    out,
    history,
    B,
    rows,
    columns,
    row_step,
    column_step,
    iterations,
    high,
    low,
    stabilizer,
    size,
    STABLE: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lines = tl.arange(0, BLOCK)[:, None] * P + tl.arange(0, P)[None, :]
    mine = history + tl.program_id(0).to(tl.int64) * (iterations + 1) * (2 * BLOCK * P)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for _ in range(tl.program_id(0), tl.cdiv(B, BLOCK), tl.num_programs(0)):
        at, inside = _place(first, B, rows, columns, row_step, column_step, BLOCK, P)
        s = tl.load(x + at, mask=inside, other=-float("inf")).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        a, u, v = _start(s, high, low, stabilizer, size, inside, STABLE)
        tl.debug_barrier()  # of the tile before, all has been read
        tl.store(mine + lines, u)
        tl.store(mine + BLOCK * P + lines, v)
        for t in range(1, iterations + 1):
            if not STABLE or t > 1:
                u = _rows(a, u, v, stabilizer, size, STABLE)
            v = _columns(a, u, v, stabilizer, STABLE)
            tl.store(mine + t * (2 * BLOCK * P) + lines, u)
            tl.store(mine + t * (2 * BLOCK * P) + BLOCK * P + lines, v)
        tl.debug_barrier()
        of_a = g * u[:, :, None] * v[:, None, :]
        of_u = tl.sum(g * a * v[:, None, :], 2)
        of_v = tl.sum(g * a * u[:, :, None], 1)
        for back in range(iterations):
            before = mine + (iterations - 1 - back) * (2 * BLOCK * P)
            old_u = tl.load(before + lines)
            old_v = tl.load(before + BLOCK * P + lines)
            sums = -(of_v * v) * v
            of_a += sums[:, None, :] * u[:, :, None]
            of_u += tl.sum(sums[:, None, :] * a, 2)
            if STABLE:
                of_v *= stabilizer * (v / old_v) * (v / old_v)
            else:
                of_v *= 0
            if not STABLE or back + 1 < iterations:
                sums = -(of_u * u) * u
                if STABLE:
                    sums /= size
                    of_u *= stabilizer / size * (u / old_u) * (u / old_u)
                else:
                    of_u *= 0
                of_a += sums[:, :, None] * old_v[:, None, :]
                of_v += tl.sum(sums[:, :, None] * a, 1)
            u, v = old_u, old_v
        if STABLE:
            a = tl.where(inside, a - stabilizer, 0.0)
            mean = tl.sum(a * of_a, 2) / size
            of_a -= mean[:, :, None]
        of_x = a * of_a * high
        tl.store(out + at, rounded(of_x, out.dtype.element_ty), mask=inside)
        first += tl.num_programs(0) * BLOCK


def _arguments(x: Tensor, epsilon, iterations, last_rows, stabilizer) -> tuple[tuple, dict]:
    B, N, M = x.shape
    rows, columns, row_step, column_step = (M, N, 1, M) if last_rows else (N, M, M, 1)
    numbers = *temperature(epsilon), float(stabilizer), columns / rows
    constants = {"STABLE": stabilizer > 0, "P": max(2, triton.next_power_of_2(max(N, M)))}
    return (B, rows, columns, row_step, column_step, iterations, *numbers), constants


def doubly_stochastic(x: Tensor, *options) -> Tensor:
    out = x.new_empty(x.shape)
    arguments, constants = _arguments(x, *options)
    config = configure(FORWARD, x.device)
    grid = (triton.cdiv(len(x), config.tiles["BLOCK"]),)
    launch(small_kernel, grid, config, x, out, *arguments, **constants)
    return out


def doubly_stochastic_backward(grad: Tensor, x: Tensor, *options) -> Tensor:
    out = x.new_empty(x.shape)
    arguments, constants = _arguments(x, *options)
    config = configure(BACKWARD, x.device, constants["P"])
    block, iterations = config.tiles["BLOCK"], options[1]
    programs = min(PROGRAMS, triton.cdiv(len(x), block))
    history = torch.empty(
        programs, iterations + 1, 2, block, constants["P"], dtype=torch.float32, device=x.device
    )
    launch(
        small_backward_kernel, (programs,), config, x, grad, out, history, *arguments, **constants
    )
    return out


def example_launches(dtype: torch.dtype) -> None:
    """4 x 4 with a stabilizer; the largest, without."""
    make = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    for n, stabilizer in ((4, 1e-6), (8, 0.0)):
        x = make(1 << 20, n, n)
        doubly_stochastic(x, 1.0, 20, False, stabilizer)
        doubly_stochastic_backward(x, x, 1.0, 20, False, stabilizer)
