"""Gradients of transport with a matrix of costs.

At the optimum, with e_ij = e^((f_i + g_j − C_ij) / ε), P = a bᵀ ∘ e and the ratios
φ'_i = Σ_j b_j e_ij, ψ'_j = Σ_i a_i e_ij of the marginals to the weights, cotangents γ of f and δ of
g have the solution X, Y of

    (1 + ε/ρ_a) φ'_i X_i + a_i Σ_j e_ij Y_j = γ_i      (1 + ε/ρ_b) ψ'_j Y_j + b_j Σ_i e_ij X_i = δ_j

and ∂C_ij = e_ij (b_j X_i + a_i Y_j),   ∂a_i = −ε Σ_j e_ij Y_j,   ∂b_j = −ε Σ_i e_ij X_i,
∂ε = Σ_ij e_ij (b_j X_i + a_i Y_j) (f_i + g_j − C_ij) / ε. Nothing divides by a weight.
"""

import torch
from torch import Tensor

from weft.reference.transport.dense import (
    Problem,
    penalty,
    ratios,
    sinkhorn,
    softmin,
)
from weft.reference.transport.sinkhorn import Settings, damping, finite

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # of C, a, b, ε, border


def of_extended(p: Problem, grad_C: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of the cost and of the border from that of the extended matrix."""
    B, N, M = p.cost.shape
    inside = grad_C[:, :N, :M]
    grad_cost = (-inside if p.similarity else inside).to(p.cost.dtype)
    if p.border is None:
        return grad_cost, None
    zero = grad_C.new_zeros(B)
    column = grad_C[:, :N, M].sum(1) if p.has_column else zero
    row = grad_C[:, N, :M].sum(1) if p.has_row else zero
    corner = grad_C[:, N, M] if p.has_row and p.has_column else zero
    return grad_cost, torch.stack([column, row, corner], 1)


def exponent(p: Problem, C: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """(f_i + g_j − C_ij) / ε; 0 where it is infinite."""
    return finite(f[:, :, None] + g[:, None] - C) / p.epsilon[:, None, None]


def solved(system: Tensor, given: Tensor) -> Tensor:
    """A⁻¹ y by A = Q R. ``torch.linalg.solve`` with two threads now and then fails on batches of a
    few hundred rows (torch 2.13 with MKL on an AMD EPYC: pivots below 1)."""
    q, r = torch.linalg.qr(system)
    return torch.linalg.solve_triangular(r, q.mT @ given, upper=True)


def sinkhorn_backward(
    grad_f: Tensor, grad_g: Tensor, p: Problem, f: Tensor, g: Tensor, rho_a: float, rho_b: float
) -> Gradients:
    """The implicit gradient: as if f and g were optimal. Of a balanced problem, where f + c and
    g − c are as good, cotangents must have Σ γ = Σ δ, as those of anything that does not depend on
    c have."""
    C, a, b = p.extended()
    N, M = C.shape[1:]
    e = ratios(C, a, b, p.epsilon, f, g)
    of_rows = diagonal((e * b[:, None]).sum(2), rho_a, p.epsilon, p.has_row)
    of_columns = diagonal((e * a[:, :, None]).sum(1), rho_b, p.epsilon, p.has_column)
    top = torch.cat([torch.diag_embed(of_rows), a[:, :, None] * e], 2)
    bottom = torch.cat([b[:, :, None] * e.mT, torch.diag_embed(of_columns)], 2)
    system = torch.cat([top, bottom], 1)
    if rho_a == rho_b == torch.inf and N and M:
        # Singular along X = a, Y = −b, which changes nothing: this asks for Σ X = Σ Y instead.
        left = torch.cat([a, -b], 1) / (a.sum(1) + b.sum(1))[:, None].clamp_min(1e-300)
        right = torch.cat([torch.ones_like(a), -torch.ones_like(b)], 1)
        system = system + left[:, :, None] * right[:, None]
    given = torch.cat([grad_f, grad_g], 1)[..., None]
    solution = solved(system.double(), given.double())[..., 0].to(given.dtype)
    X, Y = solution[:, :N], solution[:, N:]
    grad_C = e * (b[:, None] * X[:, :, None] + a[:, :, None] * Y[:, None])
    grad_a = -p.epsilon[:, None] * (e * Y[:, None]).sum(2)
    grad_b = -p.epsilon[:, None] * (e * X[:, :, None]).sum(1)
    grad_epsilon = (grad_C * exponent(p, C, f, g)).sum((1, 2))
    grad_cost, grad_border = of_extended(p, grad_C)
    return grad_cost, grad_a, grad_b, grad_epsilon, grad_border


def diagonal(sums: Tensor, rho: float, epsilon: Tensor, border: bool) -> Tensor:
    """(1 + ε/ρ) times the ratios of a marginal; 1 for what has no pair."""
    damped = 1 / damping(rho, epsilon, sums.shape[1], border)
    return torch.where(sums == 0, 1, damped * sums)


def sinkhorn_implicit(
    p: Problem, start: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The solution with its implicit derivatives in plain PyTorch, for ``torch.func``: two steps of
    Newton's method from the solution, held constant, have the right derivatives to third order."""
    constant = Problem(*(t.detach() if isinstance(t, Tensor) else t for t in vars(p).values()))
    held = None if start is None else start.detach()
    f, g, error, iterations = sinkhorn(constant, held, settings, stops=False)
    f, g = f.detach(), g.detach()
    for _ in range(2):
        f, g = newton_step(p, f, g, settings)
    return f, g, error, iterations


def newton_step(p: Problem, f: Tensor, g: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """One step towards f = λ_a softmin(g), g = λ_b softmin(f)."""
    C, a, b = p.extended()
    eps, (N, M) = p.epsilon, C.shape[1:]
    damped_a = 1 / damping(s.rho_a, eps, N, p.has_row)
    damped_b = 1 / damping(s.rho_b, eps, M, p.has_column)
    min_f, min_g = softmin(C, g, b, eps), softmin(C.mT, f, a, eps)
    absent = torch.cat([min_f.isinf() | f.isinf(), min_g.isinf() | g.isinf()], 1)
    residual = torch.cat([damped_a * f - min_f, damped_b * g - min_g], 1)
    residual = torch.where(absent, 0, residual)
    e = ratios(C, a, b, eps, f, g)
    to_columns = e * b[:, None] / nonzero((e * b[:, None]).sum(2, keepdim=True))
    to_rows = e.mT * a[:, None] / nonzero((e.mT * a[:, None]).sum(2, keepdim=True))
    top = torch.cat([torch.diag_embed(damped_a), to_columns], 2)
    system = torch.cat([top, torch.cat([to_rows, torch.diag_embed(damped_b)], 2)], 1)
    if s.rho_a == s.rho_b == torch.inf and N and M:
        left = torch.cat([torch.ones_like(f), -torch.ones_like(g)], 1)
        right = torch.cat([a, -b], 1) / nonzero(a.sum(1) + b.sum(1))[:, None]
        system = system + left[:, :, None] * right[:, None]
    step = solved(system, residual[..., None])[..., 0]
    return f - step[:, :N], g - step[:, N:]


def nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)


def plan_backward(
    grad: Tensor, p: Problem, f: Tensor, g: Tensor, log: bool
) -> tuple[Tensor | None, ...]:
    """Of P, or of log P: gradients of C, a, b, ε, the border, f and g."""
    C, a, b = p.extended()
    eps = p.epsilon[:, None, None]
    if log:
        some = (
            (a != 0)[:, :, None] & (b != 0)[:, None] & (f[:, :, None] + g[:, None] - C).isfinite()
        )
        weights = torch.where(some, grad, 0)
        grad_a, grad_b = weights.sum(2) / nonzero(a), weights.sum(1) / nonzero(b)
    else:
        plain = torch.where(grad == 0, 0, grad * ratios(C, a, b, p.epsilon, f, g))
        weights = a[:, :, None] * b[:, None] * plain
        grad_a, grad_b = (plain * b[:, None]).sum(2), (plain * a[:, :, None]).sum(1)
    grad_epsilon = -(weights * exponent(p, C, f, g)).sum((1, 2)) / p.epsilon
    grad_cost, grad_border = of_extended(p, -weights / eps)
    rows, columns = (weights / eps).sum(2), (weights / eps).sum(1)
    return grad_cost, grad_a, grad_b, grad_epsilon, grad_border, rows, columns


def value_backward(
    grad: Tensor, p: Problem, f: Tensor, g: Tensor, rho_a: float, rho_b: float
) -> Gradients:
    """The envelope's: the dual objective's partial derivatives, of which those in f and g are 0.

    ∂C = P,  ∂a_i = φ_a(f_i) + ε Σ_j b_j (1 − e_ij),  ∂b alike,  ∂ε = KL(P | a bᵀ)."""
    C, a, b = p.extended()
    e = ratios(C, a, b, p.epsilon, f, g)
    P = a[:, :, None] * b[:, None] * e
    eps = p.epsilon[:, None]
    grad_a = penalty(f, rho_a, p.has_row) + eps * (b.sum(1)[:, None] - (e * b[:, None]).sum(2))
    grad_b = penalty(g, rho_b, p.has_column) + eps * (
        a.sum(1)[:, None] - (e * a[:, :, None]).sum(1)
    )
    divergence = (P * (exponent(p, C, f, g) - 1)).sum((1, 2)) + a.sum(1) * b.sum(1)
    grad_cost, grad_border = of_extended(p, grad[:, None, None] * P)
    wide = grad[:, None]
    grad_a = torch.where(f.isinf(), 0, wide * finite(grad_a))
    grad_b = torch.where(g.isinf(), 0, wide * finite(grad_b))
    return grad_cost, grad_a, grad_b, grad * divergence, grad_border
