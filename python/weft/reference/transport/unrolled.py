"""The gradient of so many iterations of Sinkhorn, each differentiated as it was done.

With m_i = −ε log Σ_j b_j e^((g_j − C_ij) / ε), W_ij = b_j e^((g_j − C_ij + m_i) / ε) and a
cotangent X of m: ∂g_j = −Σ_i X_i W_ij, ∂C_ij = X_i W_ij, ∂b_j = −ε Σ_i X_i W_ij / b_j (0 where b_j
is), ∂ε = Σ_i X_i (m_i + Σ_j W_ij (g_j − C_ij)) / ε. An iteration is f = λ_a m(g), g = λ_b m'(f).
"""

import torch
from torch import Tensor

from weft.reference.transport.dense import Problem, over, softmin
from weft.reference.transport.gradients import nonzero, of_extended
from weft.reference.transport.sinkhorn import (
    Settings,
    damping,
    finite,
    log_weight,
    potential,
    translated,
)


def sinkhorn_unrolled_backward(
    grad_f: Tensor, grad_g: Tensor, p: Problem, start: Tensor, s: Settings
) -> tuple[Tensor | None, ...]:
    """Of exactly so many iterations: gradients of C, a, b, ε, the border and the start."""
    C, a, b = p.extended()
    eps = p.epsilon
    damped_a = damping(s.rho_a, eps, a.shape[1], p.has_row)
    damped_b = damping(s.rho_b, eps, b.shape[1], p.has_column)
    translates = s.rho_a < torch.inf and s.rho_b < torch.inf and not s.has_border
    g, done = start, []
    for _ in range(s.max_iterations):
        min_f = softmin(C, g, b, eps)
        f = potential(min_f, damped_a)
        min_g = softmin(C.mT, f, a, eps)
        new_g = potential(min_g, damped_b)
        done.append((g, min_f, f, min_g, new_g))
        g = translated(f, new_g, a, b, s.rho_a, s.rho_b)[1] if translates else new_g
    grad_C, grad_a, grad_b = torch.zeros_like(C), torch.zeros_like(a), torch.zeros_like(b)
    grad_eps = torch.zeros_like(eps)
    for g, min_f, f, min_g, new_g in reversed(done):
        if translates:
            grad_f, grad_g, of_a, of_b = translated_backward(grad_f, grad_g, f, new_g, a, b, s)
            grad_a, grad_b = grad_a + of_a, grad_b + of_b
        X, of_eps = damped_backward(grad_g, min_g, damped_b, s.rho_b, p.has_column)
        to_f, of_C, of_a, more = softmin_backward(X, C.mT, f, a, eps, min_g)
        grad_C, grad_a, grad_eps = grad_C + of_C.mT, grad_a + of_a, grad_eps + of_eps + more
        X, of_eps = damped_backward(grad_f + to_f, min_f, damped_a, s.rho_a, p.has_row)
        grad_g, of_C, of_b, more = softmin_backward(X, C, g, b, eps, min_f)
        grad_C, grad_b, grad_eps = grad_C + of_C, grad_b + of_b, grad_eps + of_eps + more
        grad_f = torch.zeros_like(grad_f)  # only the last f is a result
    grad_cost, grad_border = of_extended(p, grad_C)
    return grad_cost, grad_a, grad_b, grad_eps, grad_border, grad_g


def damped_backward(
    grad: Tensor, softmin: Tensor, damped: Tensor, rho: float, border: bool
) -> tuple[Tensor, Tensor]:
    """Of λ m: gradients of m and of the ε in λ = ρ / (ρ + ε), dλ/dε = −λ² / ρ."""
    grad = torch.where(softmin == torch.inf, 0, grad)
    slope = -damped.square() / rho
    if border:
        slope = torch.cat([slope[:, :-1], torch.zeros_like(slope[:, -1:])], 1)
    return damped * grad, (grad * slope * finite(softmin)).sum(1)


def softmin_backward(
    X: Tensor, C: Tensor, g: Tensor, b: Tensor, eps: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of g, C, b and ε from those of m."""
    ratio = over(g[:, None] - C, eps)
    some = (ratio != -torch.inf) & (b != 0)[:, None] & (m != torch.inf)[:, :, None]
    ratio = finite(ratio)
    total = ratio + log_weight(b)[:, None] + (finite(m) / eps[:, None])[:, :, None]
    weights = X[:, :, None] * torch.where(some, torch.where(some, total, 0).exp(), 0)
    columns = weights.sum(1)
    of_eps = (weights * ratio).sum((1, 2)) + (X * finite(m)).sum(1) / eps
    of_b = torch.where(b == 0, 0, -eps[:, None] * columns / nonzero(b))
    return -columns, weights, of_b, of_eps


def translated_backward(
    grad_f: Tensor, grad_g: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, s: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of f + t, g − t with t = ρ_a ρ_b / (ρ_a + ρ_b) (log Σ a e^(−f/ρ_a) − log Σ b e^(−g/ρ_b))."""
    some = ((a > 0).any(1) & (b > 0).any(1))[:, None]  # else t is 0
    total = s.rho_a * s.rho_b / (s.rho_a + s.rho_b) * (grad_f.sum(1) - grad_g.sum(1))[:, None]
    result = []
    for w, p, rho, grad, sign in ((a, f, s.rho_a, grad_f, 1), (b, g, s.rho_b, grad_g, -1)):
        share = torch.where(some, log_weight(w) - finite(p) / rho, 0).softmax(1)
        share = torch.where(some, share, 0)
        of_p = -sign * total * torch.where(p.isinf(), 0, share / rho)
        result.append((grad + of_p, torch.where(w == 0, 0, sign * total * share / nonzero(w))))
    (to_f, to_a), (to_g, to_b) = result
    return to_f, to_g, to_a, to_b
