"""An iteration of Sinkhorn's on large matrices, in three launches (updates.py has the formulas).

Blocks of rows give partial sums to the columns; tiles of columns add them in order and update g;
one program for each problem tests the error and chooses the relaxation. It lowers the flag that
later launches look at: nothing is read by the host. A program keeps whole rows in registers; where
they are too long, rows and columns take a log-sum-exp each, by tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch
from weft.triton_kernels.transport.problem import (
    INFINITY,
    Arguments,
    arguments_of,
    costs,
    entries,
    example_problems,
    finite,
    log_weight,
    places,
    sizes_of,
)
from weft.triton_kernels.transport.updates import (
    LARGEST_FACTOR,
    ROUNDING,
    damping,
    decide,
    joined,
    log_mass,
    missed,
    next_columns,
    relaxed,
    shift_of,
    sweep,
)

# By the power of two that a row is padded to.
ROWS = {
    (80, 64): Config({"BLOCK_N": 32}, num_warps=4),
    (80, 128): Config({"BLOCK_N": 16}, num_warps=4),
    (80, 256): Config({"BLOCK_N": 32}, num_warps=8),
    (80, 512): Config({"BLOCK_N": 4}, num_warps=8),
    (80, 1024): Config({"BLOCK_N": 8}, num_warps=8),
    (80, 2048): Config({"BLOCK_N": 4}, num_warps=8),
    (80, 4096): Config({"BLOCK_N": 2}, num_warps=8),
    (80, 8192): Config({"BLOCK_N": 1}, num_warps=16),
}
TABLE = {
    (80, "long"): Config({"BLOCK_N": 16, "BLOCK_M": 128}, num_warps=4),
    (80, "columns"): Config({"BLOCK_N": 32, "BLOCK_M": 64}, num_warps=4),
    (80, "settle"): Config({"BLOCK_M": 1024}, num_warps=4),
}
LONGEST = 8192  # row of which registers hold one
BLOCKS = 256  # of rows, in a problem
# State of a problem between launches.
GOING, OMEGA, CAP, HALFWAY, CHECKED, ALIVE, SHIFT, SIZE = map(tl.constexpr, range(8))
PARTS = tl.constexpr(4)  # that a block of rows sums: rows with mass, error, mass as (top, total)


@triton.jit
def rows_kernel(
    sums,
    p,
    f,
    g,
    state,
    parts,
    rho_a,
    blocks,
    rows,
    RELAX: tl.constexpr,
    DAMPED: tl.constexpr,
    TRANSLATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block of so many rows; sums: (B, blocks, M'), parts: (B, blocks, PARTS)."""
    z = (tl.program_id(0) // blocks).to(tl.int64)
    own = state + z * SIZE
    if tl.load(own + GOING) > 0:
        n, m = sizes_of(p, z)
        first = (tl.program_id(0) % blocks).to(tl.int64) * rows
        last = tl.minimum(first + rows, n + p.has_row)
        j = tl.arange(0, BLOCK_M).to(tl.int64)
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
        now = entries(g, z, j, m, p.M, p.has_column, 0.0)
        c, alive, error, top, total = sweep(
            p, z, first, last, j, f, now, b, tl.load(own + OMEGA), tl.load(p.epsilon + z), rho_a,
            n, m, RELAX, DAMPED, TRANSLATED, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        to = sums + tl.program_id(0).to(tl.int64) * (p.M + p.has_column) + j
        tl.store(to, c, mask=j < m + p.has_column)
        to = parts + tl.program_id(0) * PARTS
        tl.store(to, alive)
        tl.store(to + 1, error)
        tl.store(to + 2, top)
        tl.store(to + 3, total)


@triton.jit
def long_rows_kernel(
    parts,
    p,
    f,
    g,
    state,
    rho_a,
    blocks,
    RELAX: tl.constexpr,
    TRANSLATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """f of a block of rows, by tiles of columns."""
    z = (tl.program_id(0) // blocks).to(tl.int64)
    own = state + z * SIZE
    if tl.load(own + GOING) > 0:
        n, m = sizes_of(p, z)
        eps, omega = tl.load(p.epsilon + z), tl.load(own + OMEGA)
        i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        a = entries(p.a, z, i, n, p.N, p.has_row, 0.0)
        total = tl.zeros((BLOCK_N,), tl.float32)
        top = total - INFINITY
        for start in range(0, m + p.has_column, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M).to(tl.int64)
            log_b = log_weight(entries(p.b, z, j, m, p.M, p.has_column, 0.0))
            now = entries(g, z, j, m, p.M, p.has_column, 0.0)
            x = (now[None, :] - costs(p, z, i, j, n, m)) / eps + log_b[None, :]
            most = tl.max(x, 1)
            safe = tl.where(most == -INFINITY, 0.0, most)
            top, total = joined(top, total, most, tl.sum(tl.exp(x - safe[:, None]), 1))
        none = total == 0
        star = -eps * (tl.where(none, 0.0, top) + tl.log(tl.where(none, 1.0, total)))
        new = tl.where(none, -INFINITY, damping(rho_a, eps, i, n, p.has_row) * star)
        error = total * 0.0
        if RELAX:
            old = entries(f, z, i, n, p.N, p.has_row, 0.0)
            best, new = new, relaxed(old, new, omega)
            error = missed(a, new, (new - best) / eps)
        tl.store(f + places(z, i, n, p.N, p.has_row), new, mask=i < n + p.has_row)
        to = parts + tl.program_id(0) * PARTS
        tl.store(to, tl.sum(tl.where((a > 0) & ~none, 1.0, 0.0), 0))
        tl.store(to + 1, tl.sum(error, 0))
        if TRANSLATED:
            masses = log_mass(a, new, rho_a)
            most = tl.max(masses, 0)
            safe = tl.where(most == -INFINITY, 0.0, most)
            tl.store(to + 2, most)
            tl.store(to + 3, tl.sum(tl.exp(masses - safe), 0))


@triton.jit
def columns_kernel(
    steps,
    p,
    f,
    g,
    state,
    sums,
    parts,
    rho_b,
    blocks,
    RELAX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """g of a tile of columns; without `sums`, from the costs. steps: (B, M')."""
    tiles = tl.cdiv(p.M + p.has_column, BLOCK_M)
    z = (tl.program_id(0) // tiles).to(tl.int64)
    own = state + z * SIZE
    if tl.load(own + GOING) > 0:
        n, m = sizes_of(p, z)
        j = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = j < m + p.has_column
        c = tl.zeros((BLOCK_M,), tl.float32)
        alive = tl.load(own + ALIVE) * 0.0
        for block in range(0, blocks):
            at = z * blocks + block
            alive += tl.load(parts + at * PARTS)
            if sums is not None:
                c += tl.load(sums + at * (p.M + p.has_column) + j, mask=inside, other=0.0)
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
        now = entries(g, z, j, m, p.M, p.has_column, 0.0)
        omega, eps = tl.load(own + OMEGA), tl.load(p.epsilon + z)
        change = alive - tl.load(own + ALIVE)
        new, step = next_columns(
            p, z, j, b, now, c, change, f, omega, eps, rho_b, n, m, RELAX, BLOCK_N
        )
        at = places(z, j, m, p.M, p.has_column)
        tl.store(g + at, new, mask=inside)
        tl.store(steps + at, step, mask=inside)


@triton.jit
def settle_kernel(
    state,
    p,
    g,
    steps,
    parts,
    error_out,
    iterations,
    rho_a,
    rho_b,
    tolerance,
    blocks,
    STOPS: tl.constexpr,
    RELAX: tl.constexpr,
    TRANSLATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What follows an iteration, for each problem: translation, error, decisions."""
    z = tl.program_id(0).to(tl.int64)
    own = state + z * SIZE
    if tl.load(own + GOING) > 0:
        n, m = sizes_of(p, z)
        eps = tl.load(p.epsilon + z)
        alive, error = eps * 0.0, eps * 0.0
        top, total = eps * 0.0 - INFINITY, eps * 0.0
        for block in range(0, blocks):
            at = parts + (z * blocks + block) * PARTS
            alive += tl.load(at)
            error += tl.load(at + 1)
            if TRANSLATED:
                top, total = joined(top, total, tl.load(at + 2), tl.load(at + 3))
        shift = eps * 0.0
        if TRANSLATED:
            sums = tl.zeros((BLOCK_M,), tl.float32)
            tops = sums - INFINITY
            for start in range(0, m + p.has_column, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M).to(tl.int64)
                b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
                now = entries(g, z, j, m, p.M, p.has_column, 0.0)
                tops, sums = joined(tops, sums, log_mass(b, now, rho_b), 1.0)
            most = tl.max(tops, 0)
            of_b = tl.sum(sums * tl.exp(tops - tl.where(most == -INFINITY, 0.0, most)), 0)
            shift = shift_of(top, total, most, of_b, rho_a, rho_b)
        off = tl.zeros((BLOCK_M,), tl.float32)
        largest = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, m + p.has_column, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M).to(tl.int64)
            at = places(z, j, m, p.M, p.has_column)
            inside = j < m + p.has_column
            b = tl.load(p.b + at, mask=inside, other=0.0)
            now = tl.load(g + at, mask=inside, other=0.0)
            step = tl.load(steps + at, mask=inside, other=0.0)
            if TRANSLATED:
                now -= shift
                step += shift / eps
                tl.store(g + at, now, mask=inside)
            off += missed(b, now, step)
            largest = tl.maximum(largest, tl.abs(finite(now)))
        error = tl.maximum(error, tl.sum(off, 0))
        tl.store(error_out + z, error)
        count = tl.load(iterations + z) + 1
        tl.store(iterations + z, count)
        tl.store(own + ALIVE, alive)
        tl.store(own + SHIFT, shift)
        if STOPS:
            omega, cap = tl.load(own + OMEGA), tl.load(own + CAP)
            halfway, checked = tl.load(own + HALFWAY), tl.load(own + CHECKED)
            floor = ROUNDING * (16.0 + 2.0 * tl.max(largest, 0) / eps)
            going, omega, cap, halfway, checked = decide(
                count, error, floor, omega, cap, halfway, checked, tolerance, RELAX
            )
            tl.store(own + GOING, going.to(tl.float32))
            tl.store(own + OMEGA, omega)
            tl.store(own + CAP, cap)
            tl.store(own + HALFWAY, halfway)
            tl.store(own + CHECKED, checked)


def rows_config(M: int, device: torch.device) -> tuple[Config, int]:
    """For programs that keep rows of so many columns: the launch and the padded length."""
    width = max(16, triton.next_power_of_2(M))
    return configure(ROWS, device, max(64, width)), width


def first_state(like: Tensor) -> Tensor:
    """(B, SIZE)"""
    state = like.new_zeros(like.shape[0], SIZE.value)
    first = (
        (GOING, 1.0),
        (OMEGA, 1.0),
        (CAP, LARGEST_FACTOR.value),
        (CHECKED, torch.inf),
        (ALIVE, -1.0),
    )
    for field, value in first:
        state[:, field.value].fill_(value)
    return state


def iterate(
    p: Arguments, f: Tensor, g: Tensor, error: Tensor, iterations: Tensor, settings: tuple
) -> Tensor:
    """Fills f, g, error and iterations, which begin with a start and with 0; returns the shifts."""
    rho_a, rho_b, max_iterations, tolerance, relax = settings
    options = {"RELAX": relax}
    translated = {"TRANSLATED": rho_a < torch.inf and rho_b < torch.inf and p.border is None}
    (B, N), M, state, steps = f.shape, g.shape[1], first_state(error), g.new_empty(g.shape)
    sums, columns = None, configure(TABLE, f.device, "columns")
    if M > LONGEST:
        config = configure(TABLE, f.device, "long")
        blocks = triton.cdiv(N, config.tiles["BLOCK_N"])
    else:
        config, width = rows_config(M, f.device)
        height = config.tiles["BLOCK_N"]
        rows = height * triton.cdiv(N, height * BLOCKS)
        blocks = triton.cdiv(N, rows)
        sums = f.new_empty(B, blocks, M)
    parts, settle = f.new_empty(B, blocks, PARTS.value), configure(TABLE, f.device, "settle")
    tiles = triton.cdiv(M, columns.tiles["BLOCK_M"])
    for _ in range(max_iterations):
        if sums is None:
            operands = (parts, p, f, g, state, rho_a, blocks)
            launch(long_rows_kernel, (B * blocks,), config, *operands, **options, **translated)
        else:
            operands = (sums, p, f, g, state, parts, rho_a, blocks, rows)
            damped = {"DAMPED": rho_a < torch.inf, "BLOCK_M": width}
            launch(rows_kernel, (B * blocks,), config, *operands, **options, **translated, **damped)
        operands = (steps, p, f, g, state, sums, parts, rho_b, blocks)
        launch(columns_kernel, (B * tiles,), columns, *operands, **options)
        operands = (state, p, g, steps, parts, error, iterations, rho_a, rho_b, tolerance, blocks)
        stops = {"STOPS": tolerance >= 0}
        launch(settle_kernel, (B,), settle, *operands, **options, **translated, **stops)
    return state[:, SHIFT.value]


def example_launches(dtype: torch.dtype) -> None:
    """Rows that a program keeps and rows that it does not; all options."""
    for args in example_problems(dtype)[-2:]:
        p, a, b, epsilon = arguments_of(*args), *args[1:4]
        iterations = epsilon.new_empty(epsilon.shape, dtype=torch.int64)
        for settings in ((torch.inf, torch.inf, 1, 1e-5, True), (1.0, 0.5, 1, -1.0, False)):
            iterate(p, a, b, epsilon, iterations, settings)
