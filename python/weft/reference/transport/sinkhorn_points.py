"""Transport between points: soft minima, products with the plan and their gradients, with the
matrix of costs written out.

c(x, y) is ‖x − y‖², ‖x − y‖, −⟨x, y⟩ ("dot"), or 1 − ⟨x, y⟩ of unit vectors ("cosine"). With
e_ij = e^((f_i + g_j − c(x_i, y_j)) / ε) everything is a soft minimum, or part of the gradient of

    Q = Σ_ij e_ij ⟨L_i, R_j⟩.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.reference.transport import dense
from weft.reference.transport.dense import real_entries
from weft.reference.transport.gradients import solved
from weft.reference.transport.sinkhorn import (
    CHECK,
    STALLED,
    Settings,
    change,
    finite,
    largest,
    potential,
)

FEW = 8  # coordinates: so many are compared by their differences
LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}


@dataclass(frozen=True)
class Points:
    """The arguments of every op on points.

    x (B, N, D), y (B, M, D); epsilon (B,); rows, columns (B,) int64 or None: how many points are
    real, what lies beyond counts for nothing; ``precision`` is that of products on a GPU.
    """

    x: Tensor
    y: Tensor
    epsilon: Tensor
    rows: Tensor | None
    columns: Tensor | None
    cost: str
    precision: str

    def transposed(self) -> "Points":
        return Points(
            self.y, self.x, self.epsilon, self.columns, self.rows, self.cost, self.precision
        )


def cost_matrix(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """(B, N, M)."""
    if cost in ("dot", "cosine"):
        return float(cost == "cosine") - x @ y.mT
    if x.shape[2] <= FEW:
        squares = (x[:, :, None] - y[:, None]).square().sum(-1)
    else:
        sums = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None]
        squares = (sums - 2 * x @ y.mT).clamp_min(0)
    if cost == "sqeuclidean":
        return squares
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)


def real_pairs(p: Points) -> Tensor | None:
    """(B, N, M) bool, or None if all are."""
    N, M = p.x.shape[1], p.y.shape[1]
    real = None
    if p.rows is not None:
        real = real_entries(p.rows, N, False)[:, :, None].expand(-1, N, M)
    if p.columns is not None:
        columns = real_entries(p.columns, M, False)[:, None].expand(-1, N, M)
        real = columns if real is None else real & columns
    return real


def softmin(p: Points, g: Tensor, weight: Tensor) -> Tensor:
    """−ε log Σ_j w_j e^((g_j − c_ij) / ε), (B, N); +∞ where nothing is summed."""
    C, real = cost_matrix(p.x, p.y, p.cost), real_pairs(p)
    return dense.softmin(
        C if real is None else torch.where(real, C, torch.inf), g, weight, p.epsilon
    )


def exponents(p: Points, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(f_i + g_j − c_ij) / ε, 0 where there is no pair, and e."""
    both = finite(f)[:, :, None] + finite(g)[:, None]
    exponent = (both - cost_matrix(p.x, p.y, p.cost)) / p.epsilon[:, None, None]
    none, real = f.isinf()[:, :, None] | g.isinf()[:, None], real_pairs(p)
    if real is not None:
        none = none | ~real
    exponent = torch.where(none, 0, exponent)
    # Only pairs of which neither has weight come near the bound.
    return exponent, torch.where(none, 0, exponent.clamp_max(LARGEST_EXPONENT[f.dtype]).exp())


def product(p: Points, f: Tensor, g: Tensor, values: Tensor) -> Tensor:
    """Σ_j e_ij R_j, (B, N, E) from (B, M, E)."""
    return exponents(p, f, g)[1] @ values


def product_backward(
    p: Points, f: Tensor, g: Tensor, right: Tensor, left: Tensor
) -> tuple[Tensor, ...]:
    """The derivatives of Q in x, y, ε, f, g, R and L: with W_ij = e_ij ⟨L_i, R_j⟩

    ∂x_i = −(1/ε) Σ_j W_ij ∂c/∂x_i,   ∂ε = −(1/ε) Σ_ij W_ij (f_i + g_j − c_ij) / ε,
    ∂f_i = (1/ε) Σ_j W_ij,   ∂R_j = Σ_i e_ij L_i,   ∂L_i = Σ_j e_ij R_j; ∂y and ∂g alike."""
    exponent, e = exponents(p, f, g)
    eps = p.epsilon[:, None]
    W = e * (left @ right.mT)
    grad_x, grad_y = cost_gradients(p, W)
    return (
        -grad_x / eps[..., None],
        -grad_y / eps[..., None],
        -(W * exponent).sum((1, 2)) / p.epsilon,
        W.sum(2) / eps,
        W.sum(1) / eps,
        e.mT @ left,
        e @ right,
    )


def cost_gradients(p: Points, W: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j W_ij ∂c/∂x_i and Σ_i W_ij ∂c/∂y_j; of a distance 0 there is none."""
    if p.cost in ("dot", "cosine"):
        return -W @ p.y, -W.mT @ p.x
    if p.cost == "euclidean":
        C = cost_matrix(p.x, p.y, p.cost)
        W = torch.where(C > 0, W / torch.where(C > 0, C, 1), 0)
    else:
        W = 2 * W
    return W.sum(2)[..., None] * p.x - W @ p.y, W.sum(1)[..., None] * p.y - W.mT @ p.x


def damped(sums: Tensor, rho: float, epsilon: Tensor) -> Tensor:
    """(1 + ε/ρ) times the ratios of a marginal; 1 for what has no pair."""
    return torch.where(sums == 0, 1, (1 + epsilon / rho)[:, None] * sums)


def solve_system(
    p: Points,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    grad_f: Tensor,
    grad_g: Tensor,
    rho_a: float,
    rho_b: float,
) -> tuple[Tensor, Tensor]:
    """X, Y of the implicit gradient (gradients.py), for cotangents of f and g."""
    _, e = exponents(p, f, g)
    of_rows = damped((e * b[:, None]).sum(2), rho_a, p.epsilon)
    of_columns = damped((e * a[:, :, None]).sum(1), rho_b, p.epsilon)
    top = torch.cat([torch.diag_embed(of_rows), a[:, :, None] * e], 2)
    bottom = torch.cat([b[:, :, None] * e.mT, torch.diag_embed(of_columns)], 2)
    system, N = torch.cat([top, bottom], 1), f.shape[1]
    if rho_a == rho_b == torch.inf:
        null, ones = null_vectors(a, b)
        system = system + null[:, :, None] * ones[:, None]
    solution = solved(system, torch.cat([grad_f, grad_g], 1)[..., None])[..., 0]
    return solution[:, :N], solution[:, N:]


def null_vectors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of a balanced problem's system, right and left: X = a, Y = −b changes nothing. Scaled so that
    their product is 1."""
    mass = a.sum(1) + b.sum(1)
    null = torch.cat([a, -b], 1) / torch.where(mass > 0, mass, 1)[:, None]
    return null, torch.cat([torch.ones_like(a), -torch.ones_like(b)], 1)


def solve_symmetric(
    softmin: Callable[[Tensor], Tensor],
    a: Tensor,
    epsilon: Tensor,
    damping: Tensor,
    start: Tensor | None,
    settings: Settings,
    stops: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sinkhorn.solve`` of a cloud with itself, whose two potentials are one:
    f ← (f + λ softmin f) / 2, and in the end g = λ softmin f.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences", AISTATS 2019, section 3.1."""
    eps, s = epsilon[:, None], settings
    f = torch.zeros_like(a) if start is None else start
    error, active = torch.full_like(epsilon, torch.inf), torch.ones_like(epsilon, dtype=torch.bool)
    iterations, checked = torch.zeros_like(epsilon, dtype=torch.int64), error
    for count in range(1, s.max_iterations + 1):
        best = potential(softmin(f), damping)
        new_error = change(f, best, a, eps)
        moved = torch.where(best.isinf(), best, (finite(f) + best) / 2)
        f = torch.where(active[:, None], moved, f)
        error = torch.where(active, new_error, error)
        iterations = iterations + active
        if s.tolerance >= 0:
            active = active & (error > s.tolerance)
            if count % CHECK == 0:
                floor = torch.finfo(a.dtype).eps * (16 + 2 * largest(f) / epsilon)
                active = active & ~((error > STALLED * checked) & (error <= floor))
                checked = error
            if stops and not active.any():
                break
    return f, potential(softmin(f), damping), error, iterations
