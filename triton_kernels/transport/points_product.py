"""Products with e_ij = e^((f_i + g_j − c_ij) / ε), and all derivatives of Q = Σ_ij e_ij ⟨L_i, R_j⟩.
With W_ij = e_ij ⟨L_i, R_j⟩ and of each row i

    Σ_j e_ij R_j,   Σ_j W_ij,   Σ_j W_ij (f_i + g_j − c_ij) / ε,   Σ_j W'_ij ∂c_ij/∂x_i

where W' is W, for distances W / c. A program has a block of rows and goes over its part of the
columns, for so many of the coordinates or of the values; what several parts sum is added in their
order. The columns' sums are those of the rows with x and y in each other's place: computed twice,
they need no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch
from weft.triton_kernels.transport.points import (
    DISTANCE,
    DOT,
    INFINITY,
    SQUARED,
    Problem,
    coordinates,
    cost_tile,
    example_arguments,
    first_rows,
    parts_of,
    problem_of,
)
from weft.triton_kernels.transport.points_softmin import COUNT
from weft.triton_kernels.transport.problem import inverse_of, sizes_of

LARGEST = tl.constexpr(80.0)  # exponent; only pairs of which neither has weight come near
NARROW = 4  # values of a point that are summed without a matrix product
TABLE = {
    (80, "product", "direct"): Config(
        {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 16, "BLOCK_E": 32}, 8
    ),
    (80, "product", "ieee"): Config(
        {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_D": 16, "BLOCK_E": 16}, 8
    ),
    (80, "product", "units"): Config(
        {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_D": 32, "BLOCK_E": 32}, 8
    ),
    (90, "product", "units"): Config(
        {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32, "BLOCK_E": 32}, 8
    ),
    (80, "pull", "direct"): Config({"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_D": 16, "BLOCK_E": 16}, 8),
    (80, "pull", "ieee"): Config({"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_D": 16, "BLOCK_E": 16}, 8),
    (80, "pull", "units"): Config({"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_D": 32, "BLOCK_E": 16}, 8),
}


@triton.jit
def exponents(f_i, g_j, c, near, rest):
    """v = (f_i + g_j − c_ij) / ε, 0 where there is no pair, and e^v."""
    none = (tl.abs(f_i) == INFINITY)[:, None] | (tl.abs(g_j) == INFINITY)[None, :]
    gap = tl.where(none, 0.0, f_i[:, None] + g_j[None, :] - c)
    v = gap * near + gap * rest
    e = tl.exp(tl.where(v > LARGEST, LARGEST, v))
    return v, tl.where(none, 0.0, e)


@triton.jit
def product_kernel(
    out,
    p,
    f,
    g,
    right,
    E,
    parts,
    width,
    FEW_E: tl.constexpr,
    COST: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out (parts, B, N, E): BLOCK_E values of a block of rows; FEW_E: E where it is small, or 0."""
    blocks, tiles_e = tl.cdiv(p.N, BLOCK_N), tl.cdiv(E, BLOCK_E)
    first_e = (tl.program_id(0) % tiles_e).to(tl.int64) * BLOCK_E
    part = (tl.program_id(0) // tiles_e % parts).to(tl.int64)
    block = (tl.program_id(0) // tiles_e // parts % blocks).to(tl.int64)
    z = (tl.program_id(0) // tiles_e // parts // blocks).to(tl.int64)
    n, m = sizes_of(p, z)
    i = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = first_e + tl.arange(0, BLOCK_E)
    near, rest = inverse_of(tl.load(p.epsilon + z))
    f_i = tl.load(f + z * p.N + i, mask=i < n, other=-INFINITY)
    first, squares = first_rows(p, z, i, n, DEPTH, BLOCK_D)
    sums = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    stop = tl.where(block * BLOCK_N < n, tl.minimum((part + 1) * width, m), 0)
    for start in range(part * width, stop, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        g_j = tl.load(g + z * p.M + j, mask=j < m, other=-INFINITY)
        c = cost_tile(
            p, z, i, j, n, m, first, squares, COST, DEPTH, WHOLE, PRECISION, BLOCK_D
        )  # fmt: skip
        _, e = exponents(f_i, g_j, c, near, rest)
        if FEW_E > 0:
            sums += narrow_product(e, right + (z * p.M + j) * FEW_E, j < m, FEW_E, BLOCK_E)
        else:
            values = coordinates(right, z, j, m, p.M, E, k)
            sums = tl.dot(e, values, sums, input_precision=PRECISION)
    batch = (tl.num_programs(0) // (tiles_e * parts * blocks)).to(tl.int64)
    at = out + ((part * batch + z) * p.N + i)[:, None] * E + k[None, :]
    tl.store(at, sums, mask=(i < p.N)[:, None] & (k < E)[None, :])


@triton.jit
def narrow_product(e, values, inside, FEW_E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Σ_j e_ij R_j of a tile; `values` points at the rows of R."""
    slot = tl.arange(0, BLOCK_E)[None, :]
    sums = tl.zeros((e.shape[0], BLOCK_E), tl.float32)
    for k in tl.static_range(0, FEW_E):
        column = tl.sum(e * tl.load(values + k, mask=inside, other=0.0)[None, :], 1)
        sums += tl.where(slot == k, column[:, None], 0.0)
    return sums


@triton.jit
def pull_kernel(
    points,
    weights,
    bends,
    products,
    p,
    f,
    g,
    left,
    right,
    E,
    parts,
    width,
    FEW_E: tl.constexpr,
    COST: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Of BLOCK_D coordinates of a block of rows: −(1/ε) Σ W' ∂c/∂x (parts, B, N, D). With the first
    ones also (1/ε) Σ W and −(1/ε) Σ W v, (parts, B, N), and of few values Σ e R (parts, B, N, E).
    """
    blocks, tiles_d = tl.cdiv(p.N, BLOCK_N), tl.maximum(tl.cdiv(p.D, BLOCK_D), 1)
    first_d = (tl.program_id(0) % tiles_d).to(tl.int64) * BLOCK_D
    part = (tl.program_id(0) // tiles_d % parts).to(tl.int64)
    block = (tl.program_id(0) // tiles_d // parts % blocks).to(tl.int64)
    z = (tl.program_id(0) // tiles_d // parts // blocks).to(tl.int64)
    n, m = sizes_of(p, z)
    i = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = first_d + tl.arange(0, BLOCK_D)
    eps = tl.load(p.epsilon + z)
    near, rest = inverse_of(eps)
    f_i = tl.load(f + z * p.N + i, mask=i < n, other=-INFINITY)
    first, squares = first_rows(p, z, i, n, DEPTH, BLOCK_D)
    pulled = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    factor = tl.zeros((BLOCK_N,), tl.float32)
    weight, bend = factor, factor
    sums = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    stop = tl.where(block * BLOCK_N < n, tl.minimum((part + 1) * width, m), 0)
    for start in range(part * width, stop, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        g_j = tl.load(g + z * p.M + j, mask=j < m, other=-INFINITY)
        c = cost_tile(
            p, z, i, j, n, m, first, squares, COST, DEPTH, WHOLE, PRECISION, BLOCK_D
        )  # fmt: skip
        v, e = exponents(f_i, g_j, c, near, rest)
        W = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if FEW_E > 0:
            of_right = right + (z * p.M + j) * FEW_E
            for k in tl.static_range(0, FEW_E):
                of_left = tl.load(left + (z * p.N + i) * FEW_E + k, mask=i < n, other=0.0)
                W += of_left[:, None] * tl.load(of_right + k, mask=j < m, other=0.0)[None, :]
            sums += narrow_product(e, of_right, j < m, FEW_E, BLOCK_E)
        else:
            for start_e in range(0, E, BLOCK_E):
                k = start_e + tl.arange(0, BLOCK_E).to(tl.int64)
                of_left = coordinates(left, z, i, n, p.N, E, k)
                of_right = tl.trans(coordinates(right, z, j, m, p.M, E, k))
                W = tl.dot(of_left, of_right, W, input_precision=PRECISION)
        W = W * e
        weight += tl.sum(W, 1)
        bend += tl.sum(W * v, 1)
        if COST == DISTANCE:
            W = tl.where(c > 0, W / tl.where(c > 0, c, 1.0), 0.0)
        if DEPTH > 0:
            pulled += differences_pulled(p, z, i, j, n, m, W, DEPTH, BLOCK_D)
        else:
            factor += tl.sum(W, 1)
            y = coordinates(p.y, z, j, m, p.M, p.D, d)
            pulled = tl.dot(W, y, pulled, input_precision=PRECISION)
    if COST != DOT:
        if DEPTH == 0:
            x = coordinates(p.x, z, i, n, p.N, p.D, d)
            pulled = factor[:, None] * x - pulled
        pulled = -(2 * pulled if COST == SQUARED else pulled)
    batch = (tl.num_programs(0) // (tiles_d * parts * blocks)).to(tl.int64)
    row = (part * batch + z) * p.N + i
    inside = (i < p.N)[:, None] & (d < p.D)[None, :]
    tl.store(points + row[:, None] * p.D + d[None, :], pulled / eps, mask=inside)
    if first_d == 0:
        tl.store(weights + row, weight / eps, mask=i < p.N)
        tl.store(bends + row, -bend / eps, mask=i < p.N)
        if FEW_E > 0:
            k = tl.arange(0, BLOCK_E)
            at = products + row[:, None] * FEW_E + k[None, :]
            tl.store(at, sums, mask=(i < p.N)[:, None] & (k < FEW_E)[None, :])


@triton.jit
def differences_pulled(p, z, i, j, n, m, W, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ_j W'_ij (x_i − y_j) of a tile: x_i Σ W' − Σ W' y_j would lose digits."""
    slot = tl.arange(0, BLOCK_D)[None, :]
    pulled = tl.zeros((W.shape[0], BLOCK_D), tl.float32)
    for d in tl.static_range(0, DEPTH):
        x = tl.load(p.x + (z * p.N + i) * p.D + d, mask=i < n, other=0.0)
        y = tl.load(p.y + (z * p.M + j) * p.D + d, mask=j < m, other=0.0)
        column = tl.sum(W * (x[:, None] - y[None, :]), 1)
        pulled += tl.where(slot == d, column[:, None], 0.0)
    return pulled


def _values(config: Config, E: int) -> dict:
    """What the compiler fixes for values."""
    if 0 < E <= NARROW:
        return {"FEW_E": E, "BLOCK_E": triton.next_power_of_2(E)}
    return {"FEW_E": 0, "BLOCK_E": config.tiles["BLOCK_E"]}


def merged(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def product_of(problem: Problem, f: Tensor, g: Tensor, right: Tensor) -> Tensor:
    """Σ_j e_ij R_j, (B, N, E); all contiguous."""
    p, (B, _, E) = problem.points, right.shape
    if B * p.N * E == 0:
        return right.new_empty(B, p.N, E)
    config = configure(TABLE, f.device, "product", problem.route)
    values = _values(config, E)
    blocks, tiles_e = triton.cdiv(p.N, config.tiles["BLOCK_N"]), triton.cdiv(E, values["BLOCK_E"])
    parts, width = parts_of(B * blocks * tiles_e, p.M, config.tiles["BLOCK_M"])
    out = right.new_empty(parts, B, p.N, E)
    launch(
        *(product_kernel, (B * blocks * parts * tiles_e,), config),
        *(out, p, f, g, right, E, parts, width),
        matrix_product=problem.uses_matrix_units(),
        **{**problem.constants(config), **values},
    )
    return merged(out)


def pull_of(
    problem: Problem, f: Tensor, g: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the rows: ∂x, ∂f, what they add to ∂ε, and ∂L."""
    p, (B, _, E) = problem.points, right.shape
    if B * p.N == 0:
        rows = right.new_empty(B, p.N)
        return right.new_empty(B, p.N, p.D), rows, rows, right.new_empty(B, p.N, E)
    config = configure(TABLE, f.device, "pull", problem.route)
    values, constants = _values(config, E), problem.constants(config)
    blocks = triton.cdiv(p.N, config.tiles["BLOCK_N"])
    tiles_d = max(triton.cdiv(p.D, constants["BLOCK_D"]), 1)
    parts, width = parts_of(B * blocks * tiles_d, p.M, config.tiles["BLOCK_M"])
    points, weights = right.new_empty(parts, B, p.N, p.D), right.new_empty(parts, B, p.N)
    bends, narrow = right.new_empty(parts, B, p.N), values["FEW_E"] > 0
    products = right.new_empty(parts, B, p.N, E) if narrow else None
    launch(
        *(pull_kernel, (B * blocks * parts * tiles_d,), config),
        *(points, weights, bends, products, p, f, g, left, right, E, parts, width),
        matrix_product=problem.uses_matrix_units(),
        **{**constants, **values},
    )
    of_left = merged(products) if narrow else product_of(problem, f, g, right)
    return merged(points), merged(weights), merged(bends), of_left


def points_product(*args) -> Tensor:
    """Σ_j e_ij R_j, (B, N, E) from (B, M, E)."""
    f, g, values = (t.contiguous() for t in args[COUNT:])
    return product_of(problem_of(*args[:COUNT]), f, g, values)


def points_product_backward(*args) -> tuple[Tensor, ...]:
    """The derivatives of Q in x, y, ε, f, g, R and L."""
    f, g, right, left = (t.contiguous() for t in args[COUNT:])
    problem = problem_of(*args[:COUNT])
    grad_x, grad_f, of_epsilon, grad_left = pull_of(problem, f, g, left, right)
    grad_y, grad_g, _, grad_right = pull_of(problem.swapped(), g, f, right, left)
    grad_epsilon = of_epsilon.double().sum(1).to(of_epsilon.dtype)
    return grad_x, grad_y, grad_epsilon, grad_f, grad_g, grad_right, grad_left


def example_launches(dtype: torch.dtype) -> None:
    """The points are always float32. Few values and many."""
    for n, args in enumerate(example_arguments()):
        f, g = (t.new_empty(t.shape[:2]) for t in args[:2])
        E = 40 if n % 3 == 2 else 1 + n % 3
        left, right = f.new_empty(*f.shape, E), g.new_empty(*g.shape, E)
        points_product(*args, f, g, right)
        points_product_backward(*args, f, g, right, left)
