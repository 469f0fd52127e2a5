"""Sinkhorn's iterations on matrices of costs (updates.py has the formulas of both halves).

Problems that one program can do in time are done by one each: it iterates until its own error is
small, with g in registers. The iterations of others are launches over blocks (blocks.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch
from weft.triton_kernels.transport.blocks import iterate, rows_config
from weft.triton_kernels.transport.problem import (
    INFINITY,
    arguments_of,
    entries,
    example_problems,
    finite,
    places,
    sizes_of,
)
from weft.triton_kernels.transport.updates import (
    LARGEST_FACTOR,
    ROUNDING,
    column_minima,
    damping,
    decide,
    log_mass,
    missed,
    next_columns,
    shift_of,
    sweep,
)

TABLE = {(80,): Config({"BLOCK_N": 32, "BLOCK_M": 64}, num_warps=4)}
LONGEST = 4096  # row, of which registers hold two beside their sums
ENTRIES = 1 << 19  # of a problem that a program does in the time of three launches
PROBLEMS = 128  # of which there are so many that programs have one each, whatever their size
COUNT = 9  # arguments that all ops share


@triton.jit
def problem_kernel(
    f,
    p,
    start,
    g,
    error_out,
    iterations,
    shifts,
    rho_a,
    rho_b,
    max_iterations,
    tolerance,
    STOPS: tl.constexpr,
    RELAX: tl.constexpr,
    DAMPED: tl.constexpr,
    TRANSLATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    z = tl.program_id(0).to(tl.int64)
    n, m = sizes_of(p, z)
    eps = tl.load(p.epsilon + z)
    j = tl.arange(0, BLOCK_M).to(tl.int64)
    b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
    now = tl.zeros((BLOCK_M,), tl.float32)
    if start is not None:
        now = entries(start, z, j, m, p.M, p.has_column, 0.0)
    zero = eps * 0.0
    shift, error, alive = zero, zero + INFINITY, zero - 1.0
    omega, cap, halfway, checked = zero + 1.0, zero + LARGEST_FACTOR, zero, zero + INFINITY
    count = z.to(tl.int32) * 0
    going = count + 1
    while going * (max_iterations - count) > 0:
        count += 1
        c, now_alive, row_error, top, total = sweep(
            p, z, n * 0, n + p.has_row, j, f, now, b, omega, eps, rho_a, n, m,
            RELAX, DAMPED, TRANSLATED, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        tl.debug_barrier()  # f of all rows is there
        new, step = next_columns(
            p, z, j, b, now, c, now_alive - alive, f, omega, eps, rho_b, n, m, RELAX, BLOCK_N
        )
        alive = now_alive
        if TRANSLATED:
            masses = log_mass(b, new, rho_b)
            most = tl.max(masses, 0)
            of_b = tl.sum(tl.exp(masses - tl.where(most == -INFINITY, 0.0, most)), 0)
            shift = shift_of(top, total, most, of_b, rho_a, rho_b)
            new -= shift
            step += shift / eps
        error = tl.maximum(tl.sum(missed(b, new, step), 0), row_error)
        now = new
        if STOPS:
            floor = ROUNDING * (16.0 + 2.0 * tl.max(tl.abs(finite(now)), 0) / eps)
            going, omega, cap, halfway, checked = decide(
                count, error, floor, omega, cap, halfway, checked, tolerance, RELAX
            )
        tl.debug_barrier()
    tl.store(g + places(z, j, m, p.M, p.has_column), now, mask=j < m + p.has_column)
    tl.store(error_out + z, error)
    tl.store(iterations + z, count.to(tl.int64))
    tl.store(shifts + z, shift)


@triton.jit
def weightless_kernel(g, p, f, shifts, stride, rho_b, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """g of what takes no part in the iterations: columns of weight 0, and −∞ in the padding."""
    tiles = tl.cdiv(p.M + p.has_column, BLOCK_M)
    z = (tl.program_id(0) // tiles).to(tl.int64)
    n, m = sizes_of(p, z)
    j = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = entries(p.b, z, j, m, p.M, p.has_column, 1.0)
    tl.store(g + z * (p.M + p.has_column) + j, -INFINITY, mask=(j >= m) & (j < p.M))
    if tl.max((b == 0).to(tl.int32), 0) > 0:
        eps = tl.load(p.epsilon + z)
        soft = column_minima(p, z, j, f, eps, n, m, BLOCK_N)
        best = damping(rho_b, eps, j, m, p.has_column) * soft - tl.load(shifts + z * stride)
        best = tl.where(soft == INFINITY, -INFINITY, best)
        at = places(z, j, m, p.M, p.has_column)
        tl.store(g + at, best, mask=(b == 0) & (j < m + p.has_column))


def sinkhorn(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(f (B, N'), g (B, M'), error (B,), iterations (B,))."""
    cost, a, b, epsilon, _, rows, _, _, _, start = args[: COUNT + 1]
    rho_a, rho_b, max_iterations, tolerance, relax, _ = args[COUNT + 1 :]
    (B, N), M = a.shape, b.shape[1]
    f = a.new_full((B, N), -torch.inf) if rows is not None else a.new_empty(B, N)
    g = b.new_empty(B, M)
    error = epsilon.new_empty(B)
    iterations = epsilon.new_zeros(B, dtype=torch.int64)
    if B == 0:
        return f, g, error, iterations
    p = arguments_of(*args[:COUNT])
    translated = rho_a < torch.inf and rho_b < torch.inf and p.border is None
    if M <= LONGEST and (N * M <= ENTRIES or B >= PROBLEMS):
        shifts = epsilon.new_empty(B)
        config, width = rows_config(M, f.device)
        first = None if start is None else start.contiguous()
        operands = (f, p, first, g, error, iterations, shifts, rho_a, rho_b)
        launch(
            problem_kernel,
            (B,),
            config,
            *(*operands, max_iterations, tolerance),
            STOPS=tolerance >= 0,
            RELAX=relax,
            DAMPED=rho_a < torch.inf,
            TRANSLATED=translated,
            BLOCK_M=width,
        )
    else:
        g.zero_() if start is None else g.copy_(start)
        settings = (rho_a, rho_b, max_iterations, tolerance, relax)
        shifts = iterate(p, f, g, error, iterations, settings)
    config = configure(TABLE, f.device)
    tiles = triton.cdiv(M, config.tiles["BLOCK_M"])
    if M:
        operands = (g, p, f, shifts, shifts.stride(0), rho_b)
        launch(weightless_kernel, (B * tiles,), config, *operands)
    return f + shifts[:, None] if translated else f, g, error, iterations


def example_launches(dtype: torch.dtype) -> None:
    """Every form of a problem and of an iteration, small and large."""
    balanced, unbalanced = (torch.inf, torch.inf), (1.0, 0.5)
    for args in example_problems(dtype):
        sinkhorn(*args, None, *balanced, 3, 1e-5, True, False)
        sinkhorn(*args, args[2], *unbalanced, 3, -1.0, False, False)
    for M in (16, 100, 1000, 2000, 4000, 8000):
        cost = torch.empty(PROBLEMS, 40, M, dtype=dtype, device="meta")
        a, b = (cost.new_empty(PROBLEMS, n, dtype=torch.float32) for n in (40, M))
        rest = (a[:, 0], None, None, None, None, False)
        sinkhorn(cost, a, b, *rest, None, *balanced, 3, 1e-5, True, False)
