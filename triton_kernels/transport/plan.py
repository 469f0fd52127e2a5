"""The plan of potentials, its gradients, and those of the dual objective:

P_ij = a_i b_j e_ij,   e_ij = exp x_ij,   x_ij = (f_i + g_j − C_ij) / ε

(weft/reference/transport/gradients.py has the formulas). A gradient is one pass over the costs:
each entry gives a term to ∂C, to the sums of its row and of its column, and to a scalar. A program
has a block of rows and goes over the columns by tiles; what it sums for the columns is written and
added by a second kernel in the order of the blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch, rounded
from weft.triton_kernels.transport.problem import (
    INFINITY,
    arguments_of,
    costs,
    entries,
    example_problems,
    finite,
    is_constraint,
    log_weight,
    penalty,
    places,
    ratio,
    sizes_of,
)

TABLE = {
    (80, "plan"): Config({"BLOCK_N": 16, "BLOCK_M": 128}, num_warps=4),
    (80, "pass"): Config({"BLOCK_N": 8, "BLOCK_M": 64}, num_warps=4),
    (80, "implicit"): Config({"BLOCK_N": 16, "BLOCK_M": 64}, num_warps=4),
    (80, "merge"): Config({"BLOCK_M": 128}, num_warps=4),
    (80, "value"): Config({"BLOCK": 1024}, num_warps=4),
}
COUNT = 9  # arguments that all ops share
TILES = ("BLOCK_N", "BLOCK_M")
SCALARS = tl.constexpr(5)  # that a block of a pass sums: of ∂ε, of the border, of the weights


class Upstream(NamedTuple):
    """What a pass reads beside the problem and its potentials; None for what it does not."""

    grad: object  # of P (B, N', M'), or of the value (B,)
    strides: object
    X: object  # solution of the implicit system, (B, N') and (B, M')
    Y: object
    rho_a: object
    rho_b: object


@triton.jit
def plan_kernel(out, p, f, g, LOG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """P or log P where the problem is; the padding is left as it is."""
    tiles_m = tl.cdiv(p.M + p.has_column, BLOCK_M)
    tiles = tiles_m * tl.cdiv(p.N + p.has_row, BLOCK_N)
    z = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    n, m = sizes_of(p, z)
    i = (tile // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    a, b = entries(p.a, z, i, n, p.N, p.has_row, 0.0), entries(p.b, z, j, m, p.M, p.has_column, 0.0)
    f_i = entries(f, z, i, n, p.N, p.has_row, 0.0)
    g_j = entries(g, z, j, m, p.M, p.has_column, 0.0)
    x = (f_i[:, None] + g_j[None, :] - costs(p, z, i, j, n, m)) * (1.0 / tl.load(p.epsilon + z))
    if LOG:
        total = log_weight(a)[:, None] + log_weight(b)[None, :] + x
        result = tl.where((total != total) & (x == x), -INFINITY, total)
    else:
        result = a[:, None] * (b[None, :] * ratio(x, a, b))
    at = places(z, i, n, p.N, p.has_row)[:, None] * (p.M + p.has_column)
    at += places(z * 0, j, m, p.M, p.has_column)[None, :]
    inside = (i < n + p.has_row)[:, None] & (j < m + p.has_column)[None, :]
    tl.store(out + at, rounded(result, out.dtype.element_ty), mask=inside)


@triton.jit
def finished(sums, weight, potential, eps, upstream, rho, exact, other_mass, KIND: tl.constexpr):
    """The gradients of weights and of potentials from the sums of a pass."""
    if KIND == "log":
        of_weight, of_potential = sums / tl.where(weight == 0, 1.0, weight), sums / eps
    elif KIND == "plan":
        of_weight, of_potential = sums, weight * sums / eps
    elif KIND == "value":
        whole = upstream * (finite(penalty(potential, rho, exact)) + eps * (other_mass - sums))
        of_weight = tl.where(tl.abs(potential) == INFINITY, 0.0, whole)
        of_potential = of_weight
    else:
        of_weight, of_potential = -eps * sums, sums
    return of_weight, of_potential


@triton.jit
def pass_kernel(
    sums,
    p,
    f,
    g,
    up,
    grad_cost,
    grad_a,
    grad_f,
    scalars,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """KIND: "plan", "log" (of P or log P), "value", "implicit" (of the potentials). sums:
    (B, blocks, M'), scalars: (B, blocks, SCALARS)."""
    blocks = tl.cdiv(p.N + p.has_row, BLOCK_N)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    n, m = sizes_of(p, z)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    eps = tl.load(p.epsilon + z)
    inverse = 1.0 / eps
    a = entries(p.a, z, i, n, p.N, p.has_row, 0.0)
    f_i = entries(f, z, i, n, p.N, p.has_row, 0.0)
    upstream = tl.load(up.grad + z) if KIND == "value" else 0.0
    if KIND == "implicit":
        X = entries(up.X, z, i, n, p.N, p.has_row, 0.0)
    of_rows = tl.zeros((BLOCK_N,), tl.float32)
    of_epsilon = tl.zeros((BLOCK_N,), tl.float32)
    of_column, of_row, of_corner = of_rows, of_rows, of_rows
    mass = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, m + p.has_column, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
        g_j = entries(g, z, j, m, p.M, p.has_column, 0.0)
        x = (f_i[:, None] + g_j[None, :] - costs(p, z, i, j, n, m)) * inverse
        inside = (i < n + p.has_row)[:, None] & (j < m + p.has_column)[None, :]
        if KIND == "plan" or KIND == "log":
            at = up.grad + z * up.strides[0]
            at += tl.where(i < n, i, p.N)[:, None] * up.strides[1]
            at += tl.where(j < m, j, p.M)[None, :] * up.strides[2]
            G = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if KIND == "log":
            some = (tl.abs(x) < INFINITY) & ((a != 0)[:, None] & (b != 0)[None, :])
            w = tl.where(some, G, 0.0)
            to_cost, to_row, to_column, to_all = -w * inverse, w, w, w * finite(x)
        elif KIND == "plan":
            plain = tl.where(G == 0, 0.0, G * ratio(x, a, b))
            to_row, to_column = plain * b[None, :], plain * a[:, None]
            w = to_row * a[:, None]
            to_cost, to_all = -w * inverse, w * finite(x)
        elif KIND == "value":
            e = ratio(x, a, b)
            to_row, to_column = e * b[None, :], e * a[:, None]
            w = to_row * a[:, None]
            to_cost, to_all = upstream * w, w * (finite(x) - 1.0)
        else:
            e = ratio(x, a, b)
            Y = entries(up.Y, z, j, m, p.M, p.has_column, 0.0)
            to_row, to_column = e * Y[None, :], e * X[:, None]
            to_cost = e * (b[None, :] * X[:, None] + a[:, None] * Y[None, :])
            to_all = to_cost * finite(x)
        mass += b
        of_rows += tl.sum(to_row, 1)
        of_epsilon += tl.sum(to_all, 1)
        to = sums + tl.program_id(0).to(tl.int64) * (p.M + p.has_column) + j
        tl.store(to, tl.sum(to_column, 0), mask=j < m + p.has_column)
        if p.border is not None:
            bottom, right = (i == n)[:, None], (j == m)[None, :]
            of_column += tl.sum(tl.where(right & (i < n)[:, None], to_cost, 0.0), 1)
            of_row += tl.sum(tl.where(bottom & (j < m)[None, :], to_cost, 0.0), 1)
            of_corner += tl.sum(tl.where(bottom & right, to_cost, 0.0), 1)
        inside = (i < n)[:, None] & (j < m)[None, :]
        at = grad_cost + (z * p.N + i)[:, None] * p.M + j[None, :]
        tl.store(at, rounded(to_cost * p.sign, grad_cost.dtype.element_ty), mask=inside)
    bottom = (i == n) & (i < n + p.has_row)
    mass_b = tl.sum(mass, 0)
    of_a, of_f = finished(of_rows, a, f_i, eps, upstream, up.rho_a, bottom, mass_b, KIND)
    at = places(z, i, n, p.N, p.has_row)
    tl.store(grad_a + at, of_a, mask=i < n + p.has_row)
    if grad_f is not None:
        tl.store(grad_f + at, of_f, mask=i < n + p.has_row)
    to = scalars + tl.program_id(0) * SCALARS
    tl.store(to, tl.sum(of_epsilon, 0))
    tl.store(to + 1, tl.sum(of_column, 0))
    tl.store(to + 2, tl.sum(of_row, 0))
    tl.store(to + 3, tl.sum(of_corner, 0))
    tl.store(to + 4, tl.sum(a, 0))


@triton.jit
def merge_kernel(
    sums,
    p,
    g,
    up,
    scalars,
    grad_b,
    grad_g,
    grad_epsilon,
    grad_border,
    blocks,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sums of all blocks for a tile of columns; of the first tile, the scalars too."""
    tiles = tl.cdiv(p.M + p.has_column, BLOCK_M)
    z = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    n, m = sizes_of(p, z)
    eps = tl.load(p.epsilon + z)
    j = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
    g_j = entries(g, z, j, m, p.M, p.has_column, 0.0)
    upstream = tl.load(up.grad + z) if KIND == "value" else 0.0
    total = tl.zeros((BLOCK_M,), tl.float32)
    of_epsilon, of_column, of_row = eps * 0, eps * 0, eps * 0
    of_corner, mass = eps * 0, eps * 0
    for block in range(0, blocks):
        at = z * blocks + block
        column = sums + at * (p.M + p.has_column) + j
        total += tl.load(column, mask=j < m + p.has_column, other=0.0)
        of_epsilon += tl.load(scalars + at * SCALARS)
        of_column += tl.load(scalars + at * SCALARS + 1)
        of_row += tl.load(scalars + at * SCALARS + 2)
        of_corner += tl.load(scalars + at * SCALARS + 3)
        mass += tl.load(scalars + at * SCALARS + 4)
    right = (j == m) & (j < m + p.has_column)
    of_b, of_g = finished(total, b, g_j, eps, upstream, up.rho_b, right, mass, KIND)
    at = places(z, j, m, p.M, p.has_column)
    tl.store(grad_b + at, of_b, mask=j < m + p.has_column)
    if grad_g is not None:
        tl.store(grad_g + at, of_g, mask=j < m + p.has_column)
    if tile == 0:
        if KIND == "value":
            masses = mass * 0
            for start in range(0, m + p.has_column, BLOCK_M):
                k = start + tl.arange(0, BLOCK_M).to(tl.int64)
                masses += tl.sum(entries(p.b, z, k, m, p.M, p.has_column, 0.0), 0)
            of_epsilon = upstream * (of_epsilon + mass * masses)
        elif KIND != "implicit":
            of_epsilon = -of_epsilon / eps
        tl.store(grad_epsilon + z, of_epsilon)
        if p.border is not None:
            tl.store(grad_border + 3 * z, of_column)
            tl.store(grad_border + 3 * z + 1, of_row)
            tl.store(grad_border + 3 * z + 2, of_corner)


@triton.jit
def dual_part(potentials, weights, z, n, N, more, rho, BLOCK: tl.constexpr):
    """(Σ w, Σ w φ(p), Σ w φ'(p)) of one side, nothing from what has no weight or no potential; in
    float64, as the value is a small difference of these."""
    mass = tl.zeros((BLOCK,), tl.float64)
    soft, slope = mass, mass
    for start in range(0, n + more, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        w = entries(weights, z, k, n, N, more, 0.0).to(tl.float64)
        x = entries(potentials, z, k, n, N, more, 0.0).to(tl.float64)
        exact = is_constraint(rho) | ((k == n) & (k < n + more))
        some = (w != 0) & (tl.abs(x) != INFINITY)
        mass += w
        soft += tl.where(some, w * penalty(tl.where(some, x, 0.0), rho, exact), 0.0)
        slope += tl.where(some, w * tl.where(exact, 1.0, tl.exp(-x / rho)), 0.0)
    return tl.sum(mass, 0), tl.sum(soft, 0), tl.sum(slope, 0)


@triton.jit
def value_kernel(out, p, f, g, rho_a, rho_b, BLOCK: tl.constexpr):
    z = tl.program_id(0).to(tl.int64)
    n, m = sizes_of(p, z)
    mass_a, of_a, _ = dual_part(f, p.a, z, n, p.N, p.has_row, rho_a, BLOCK)
    mass_b, of_b, moved = dual_part(g, p.b, z, m, p.M, p.has_column, rho_b, BLOCK)
    value = of_a + of_b + tl.load(p.epsilon + z) * (mass_a * mass_b - moved)
    tl.store(out + z, value.to(tl.float32))


def transport_plan(*args) -> Tensor:
    """P (B, N', M') in the dtype of the cost, or its logarithm."""
    f, g, log = args[COUNT:]
    p, shape = arguments_of(*args[:COUNT]), (f.shape[0], f.shape[1], g.shape[1])
    if p.rows is None and p.columns is None:
        out = args[0].new_empty(shape)
    else:
        out = args[0].new_full(shape, -torch.inf if log else 0.0)
    if out.numel() == 0:
        return out
    config = configure(TABLE, f.device, "plan")
    tiles = [triton.cdiv(n, config.tiles[b]) for n, b in zip(shape[1:], TILES, strict=True)]
    grid = (shape[0] * tiles[0] * tiles[1],)
    launch(plan_kernel, grid, config, out, p, f.contiguous(), g.contiguous(), LOG=log)
    return out


def gradients(args: tuple, f: Tensor, g: Tensor, up: Upstream, kind: str) -> tuple[Tensor, ...]:
    """(∂C, ∂a, ∂b, ∂ε, ∂border), and of P also (∂f, ∂g)."""
    cost, _, _, epsilon, _, rows, columns, border, _ = args
    B, N, M = cost.shape
    full = f.numel() > 0 and g.numel() > 0
    padded = rows is not None or columns is not None
    empty = f.new_empty if full else f.new_zeros
    make = f.new_zeros if padded else empty
    grad_cost = cost.new_zeros(B, N, M) if padded else cost.new_empty(B, N, M)
    grad_a, grad_b = make(f.shape), make(g.shape)
    grad_epsilon = empty(epsilon.shape)
    grad_border = f.new_empty(0) if border is None else empty(B, 3)
    potentials = (make(f.shape), make(g.shape)) if kind in ("plan", "log") else (None, None)
    results = (grad_cost, grad_a, grad_b, grad_epsilon, grad_border)
    if full:
        p, f, g = arguments_of(*args), f.contiguous(), g.contiguous()
        config = configure(TABLE, f.device, "implicit" if kind == "implicit" else "pass")
        blocks = triton.cdiv(f.shape[1], config.tiles["BLOCK_N"])
        sums = f.new_empty(B, blocks, g.shape[1])
        scalars = f.new_empty(B, blocks, SCALARS.value)
        outputs = (grad_cost, grad_a, potentials[0], scalars)
        launch(pass_kernel, (B * blocks,), config, sums, p, f, g, up, *outputs, KIND=kind)
        config = configure(TABLE, f.device, "merge")
        tiles = triton.cdiv(g.shape[1], config.tiles["BLOCK_M"])
        operands = (sums, p, g, up, scalars, grad_b, potentials[1], grad_epsilon)
        outputs = (None if border is None else grad_border, blocks)
        launch(merge_kernel, (B * tiles,), config, *operands, *outputs, KIND=kind)
    return results if potentials[0] is None else (*results, *potentials)


def transport_plan_backward(*args) -> tuple[Tensor, ...]:
    f, g, grad, log = args[COUNT:]
    up = Upstream(grad, grad.stride(), None, None, 0.0, 0.0)
    return gradients(args[:COUNT], f, g, up, "log" if log else "plan")


def transport_value(*args) -> Tensor:
    """The dual objective, (B,)."""
    f, g, rho_a, rho_b = args[COUNT:]
    out = f.new_empty(f.shape[0])
    if out.numel():
        p, config = arguments_of(*args[:COUNT]), configure(TABLE, f.device, "value")
        launch(value_kernel, (f.shape[0],), config, out, p, f.contiguous(), g.contiguous(),
               rho_a, rho_b)  # fmt: skip
    return out


def transport_value_backward(*args) -> tuple[Tensor, ...]:
    f, g, grad, rho_a, rho_b = args[COUNT:]
    up = Upstream(grad.contiguous(), None, None, None, rho_a, rho_b)
    return gradients(args[:COUNT], f, g, up, "value")


def example_launches(dtype: torch.dtype) -> None:
    """Every kind of pass, every form of a problem."""
    for n, args in enumerate(example_problems(dtype)):
        f, g = (t.new_empty(t.shape) for t in args[1:3])
        P = transport_plan(*args, f, g, n == 1)
        transport_plan_backward(*args, f, g, P, n == 1)
        transport_value(*args, f, g, 1.0, float("inf"))
        transport_value_backward(*args, f, g, f.new_empty(f.shape[0]), 1.0, float("inf"))
