"""The gradient of exactly T plain iterations. Back through iteration t, from cotangents γ of f and
δ of g, with F and G the potentials before damping, f = λ F and g = λ G:

    q_ij = e^((f_i + G_j − C_ij) / ε)          u_j = λ_j δ_j    γ_i ← γ_i − a_i Σ_j u_j q_ij
    p_ij = e^((g^(t−1)_j + F_i − C_ij) / ε)    v_i = λ_i γ_i    δ_j ← −b_j Σ_i v_i p_ij
    ∂C_ij += a_i u_j q_ij + b_j v_i p_ij       ∂a_i −= ε Σ_j u_j q_ij    ∂b_j −= ε Σ_i v_i p_ij
    ε ∂ε += Σ_j u_j g_j + Σ_i v_i f_i + Σ_ij (a_i u_j q_ij (f_i − C_ij) + b_j v_i p_ij (g_j − C_ij))

The potentials of all iterations are made first and kept, as are u and v: vectors. A launch over
blocks of rows, by tiles of columns, goes back through an iteration. Then ∂C is written once: each
entry is a sum over the iterations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch, rounded
from weft.triton_kernels.transport.plan import COUNT
from weft.triton_kernels.transport.problem import (
    arguments_of,
    costs,
    entries,
    example_problems,
    finite,
    places,
    sizes_of,
)
from weft.triton_kernels.transport.sinkhorn import sinkhorn
from weft.triton_kernels.transport.updates import damping

TABLE = {
    (80, "rows"): Config({"BLOCK_N": 16, "BLOCK_M": 64}, num_warps=4),
    (80, "costs"): Config({"BLOCK_N": 8, "BLOCK_M": 32}, num_warps=4),
}


@triton.jit
def rows_kernel(
    sums,
    p,
    f,
    g,
    before,
    u,
    gamma,
    v,
    grad_a,
    rho_a,
    rho_b,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """v and Σ_i v_i p_ij of a block of rows, (B, blocks, M'); grad_a grows. `before`: g^(t−1)."""
    blocks = tl.cdiv(p.N + p.has_row, BLOCK_N)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    n, m = sizes_of(p, z)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    width = m + p.has_column
    eps = tl.load(p.epsilon + z)
    a = entries(p.a, z, i, n, p.N, p.has_row, 0.0)
    f_i = entries(f, z, i, n, p.N, p.has_row, 0.0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, width, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        u_j = entries(u, z, j, m, p.M, p.has_column, 0.0)
        g_j = entries(g, z, j, m, p.M, p.has_column, 0.0)
        g_j = g_j / damping(rho_b, eps, j, m, p.has_column)
        c = costs(p, z, i, j, n, m)
        q = tl.exp((f_i[:, None] + g_j[None, :] - c) / eps)
        q = tl.where((a == 0)[:, None], 0.0, q)
        total += tl.sum(q * u_j[None, :], 1)
    at = places(z, i, n, p.N, p.has_row)
    damp = damping(rho_a, eps, i, n, p.has_row)
    weight = damp * (entries(gamma, z, i, n, p.N, p.has_row, 0.0) - a * total)
    weight = tl.where(finite(f_i) == f_i, weight, 0.0)
    inside = i < n + p.has_row
    tl.store(v + at, weight, mask=inside)
    tl.store(grad_a + at, tl.load(grad_a + at, mask=inside, other=0.0) - eps * total, mask=inside)
    f_i = f_i / damp
    for start in range(0, width, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
        g_j = entries(before, z, j, m, p.M, p.has_column, 0.0)
        c = costs(p, z, i, j, n, m)
        e = tl.exp((f_i[:, None] + g_j[None, :] - c) / eps)
        e = tl.where((b == 0)[None, :], 0.0, e)
        to = sums + tl.program_id(0).to(tl.int64) * (p.M + p.has_column) + j
        tl.store(to, tl.sum(e * weight[:, None], 0), mask=j < width)


@triton.jit
def costs_kernel(
    grad_cost,
    p,
    f,
    g,
    u,
    v,
    scalars,
    rho_a,
    rho_b,
    iterations,
    batch,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """∂C of a block of rows; scalars: (B, blocks, 4), of ε ∂ε and of the border. f, v: (T, B, N'),
    u: (T, B, M'), g: (T + 1, B, M')."""
    blocks = tl.cdiv(p.N + p.has_row, BLOCK_N)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    n, m = sizes_of(p, z)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    eps = tl.load(p.epsilon + z)
    a = entries(p.a, z, i, n, p.N, p.has_row, 0.0)
    damp_a = damping(rho_a, eps, i, n, p.has_row)
    of_epsilon = tl.zeros((BLOCK_N,), tl.float32)
    of_column, of_row, of_corner = of_epsilon, of_epsilon, of_epsilon
    for start in range(0, m + p.has_column, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
        damp_b = damping(rho_b, eps, j, m, p.has_column)
        c = costs(p, z, i, j, n, m)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        bend = total
        for t in range(0, iterations):
            y = z + t * batch  # of the vectors of iteration t
            f_i = entries(f, y, i, n, p.N, p.has_row, 0.0)
            v_i = entries(v, y, i, n, p.N, p.has_row, 0.0)
            u_j = entries(u, y, j, m, p.M, p.has_column, 0.0)
            before = entries(g, y, j, m, p.M, p.has_column, 0.0)
            after = entries(g, y + batch, j, m, p.M, p.has_column, 0.0)
            q = tl.exp((f_i[:, None] + (after / damp_b)[None, :] - c) / eps)
            q = tl.where((a == 0)[:, None] | (u_j == 0)[None, :], 0.0, q)
            q *= a[:, None] * u_j[None, :]
            e = tl.exp(((f_i / damp_a)[:, None] + before[None, :] - c) / eps)
            e = tl.where((b == 0)[None, :] | (v_i == 0)[:, None], 0.0, e)
            e *= v_i[:, None] * b[None, :]
            total += q + e
            bend += q * finite(f_i[:, None] - c) + e * finite(before[None, :] - c)
        of_epsilon += tl.sum(bend, 1)
        if p.border is not None:
            bottom, right = (i == n)[:, None], (j == m)[None, :]
            of_column += tl.sum(tl.where(right & (i < n)[:, None], total, 0.0), 1)
            of_row += tl.sum(tl.where(bottom & (j < m)[None, :], total, 0.0), 1)
            of_corner += tl.sum(tl.where(bottom & right, total, 0.0), 1)
        inside = (i < n)[:, None] & (j < m)[None, :]
        at = grad_cost + (z * p.N + i)[:, None] * p.M + j[None, :]
        tl.store(at, rounded(total * p.sign, grad_cost.dtype.element_ty), mask=inside)
    to = scalars + tl.program_id(0) * 4
    tl.store(to, tl.sum(of_epsilon, 0))
    tl.store(to + 1, tl.sum(of_column, 0))
    tl.store(to + 2, tl.sum(of_row, 0))
    tl.store(to + 3, tl.sum(of_corner, 0))


def sinkhorn_unrolled_backward(*args) -> tuple[Tensor, ...]:
    """(∂C, ∂a, ∂b, ∂ε, ∂border, ∂start)."""
    cost, a, b, epsilon, _, rows, columns, border, _ = args[:COUNT]
    start, grad_f, grad_g, rho_a, rho_b, T = args[COUNT:]
    (B, N), M = a.shape, b.shape[1]
    padded = rows is not None or columns is not None
    grad_cost = cost.new_zeros(cost.shape) if padded else cost.new_empty(cost.shape)
    grad_a, grad_b, delta = a.new_zeros(B, N), b.new_zeros(B, M), grad_g.contiguous()
    if N == 0 or M == 0 or B == 0:
        of_border = a.new_zeros(0 if border is None else (B, 3))
        return grad_cost, grad_a, grad_b, epsilon.new_zeros(B), of_border, b.new_zeros(B, M)
    p, config = arguments_of(*args[:COUNT]), configure(TABLE, a.device, "rows")
    f, g = a.new_empty(T, B, N), b.new_empty(T + 1, B, M)
    u, v = b.new_zeros(T, B, M), a.new_zeros(T, B, N)
    g[0] = 0 if start is None else start
    for t in range(T):
        found = sinkhorn(*args[:COUNT], g[t], rho_a, rho_b, 1, -1.0, False, True)
        f[t], g[t + 1] = found[0], found[1]
    damp_b = (1 / (1 + epsilon / rho_b))[:, None].expand(B, M).clone()
    if p.has_column:
        damp_b[:, -1] = 1
    gamma, sums = grad_f.contiguous(), a.new_empty(B, triton.cdiv(N, config.tiles["BLOCK_N"]), M)
    if padded:
        sums.zero_()
    for t in reversed(range(T)):
        u[t] = torch.where(g[t + 1].isinf(), 0, damp_b * delta)
        operands = (sums, p, f[t], g[t + 1], g[t], u[t], gamma, v[t], grad_a, rho_a, rho_b)
        launch(rows_kernel, (sums.shape[0] * sums.shape[1],), config, *operands)
        # Columns are numbered without padding there.
        given = spread_columns(sums.sum(1), columns, p.has_column)
        grad_b -= epsilon[:, None] * given
        delta, gamma = -b * given, torch.zeros_like(gamma) if t == T - 1 else gamma
    config = configure(TABLE, a.device, "costs")
    blocks = triton.cdiv(N, config.tiles["BLOCK_N"])
    scalars = a.new_empty(B, blocks, 4)
    operands = (grad_cost, p, f, g, u, v, scalars, rho_a, rho_b, T, B)
    launch(costs_kernel, (B * blocks,), config, *operands)
    scalars = scalars.sum(1)
    moved = (u * finite_of(g[1:])).sum((0, 2)) + (v * finite_of(f)).sum((0, 2))
    grad_border = a.new_empty(0) if border is None else scalars[:, 1:].contiguous()
    return grad_cost, grad_a, grad_b, (moved + scalars[:, 0]) / epsilon, grad_border, delta


def finite_of(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), 0, x)


def spread_columns(x: Tensor, columns: Tensor | None, more: int) -> Tensor:
    """(B, M') without padding as the columns lie: 0 in the padding, the dustbin behind it."""
    if columns is None:
        return x
    M = x.shape[1] - more
    m = columns.clamp(0, M)[:, None]
    inside = torch.arange(M, device=x.device) < m
    real = torch.where(inside, x[:, :M], 0)
    return torch.cat([real, x.gather(1, m)], 1) if more else real


def example_launches(dtype: torch.dtype) -> None:
    """Every form of a problem."""
    for args in example_problems(dtype):
        f, g = (t.new_empty(t.shape) for t in args[1:3])
        sinkhorn_unrolled_backward(*args, None, f, g, 1.0, torch.inf, 3)
