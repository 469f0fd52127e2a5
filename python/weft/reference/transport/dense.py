"""Transport with a matrix of costs: the problem written out, its solution, plan and value, and
their gradients.

The matrices here are the extended ones (B, N', M'): with the dustbin's row and column where there
are any, and +∞ where a mask or a length forbids a pair. With e_ij = e^((f_i + g_j − C_ij) / ε) the
plan is P_ij = a_i b_j e_ij.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.reference.transport.sinkhorn import Settings, damping, finite, log_weight, solve, total


@dataclass(frozen=True)
class Problem:
    """The arguments of every op of the family.

    cost (B, N, M); a (B, N'), b (B, M') ≥ 0 with N' = N + 1 or M' = M + 1 where there is a dustbin;
    epsilon (B,); mask (B, N, M) bool; rows, columns (B,) int64: how many are real, without the
    dustbin's; border (B, 3): the costs of the last column, of the last row, of their corner.
    ``similarity``: the cost is −cost.
    """

    cost: Tensor
    a: Tensor
    b: Tensor
    epsilon: Tensor
    mask: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    border: Tensor | None
    similarity: bool

    @property
    def has_row(self) -> bool:
        return self.a.shape[1] > self.cost.shape[1]

    @property
    def has_column(self) -> bool:
        return self.b.shape[1] > self.cost.shape[2]

    def extended(self) -> tuple[Tensor, Tensor, Tensor]:
        """The matrix of costs (B, N', M') and the weights, 0 beyond the lengths."""
        C = self.cost.to(self.a.dtype)
        C = -C if self.similarity else C
        if self.mask is not None:
            C = torch.where(self.mask, C, torch.inf)
        B, N, M = C.shape
        if self.has_column:
            C = torch.cat([C, self.border[:, :1, None].expand(B, N, 1)], 2)
        if self.has_row:
            last = self.border[:, 1:2, None].expand(B, 1, M)
            if self.has_column:
                last = torch.cat([last, self.border[:, 2:, None]], 2)
            C = torch.cat([C, last], 1)
        a, b = self.a, self.b
        if self.rows is not None:
            real = real_entries(self.rows, N, self.has_row)
            C, a = torch.where(real[:, :, None], C, torch.inf), torch.where(real, a, 0)
        if self.columns is not None:
            real = real_entries(self.columns, M, self.has_column)
            C, b = torch.where(real[:, None], C, torch.inf), torch.where(real, b, 0)
        return C, a, b


def real_entries(lengths: Tensor, count: int, border: bool) -> Tensor:
    """(B, count') bool: those before the length, and the dustbin."""
    real = torch.arange(count, device=lengths.device) < lengths[:, None]
    return (
        torch.cat([real, torch.ones_like(lengths, dtype=torch.bool)[:, None]], 1)
        if border
        else real
    )


def softmin(C: Tensor, g: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """−ε log Σ_j b_j e^((g_j − C_ij) / ε) over the last dimension; +∞ where nothing is summed."""
    x = log_weight(b)[:, None] + over(g[:, None] - C, eps)
    largest = x.detach().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:2], 1)
    largest = finite(largest)
    total = (x - largest).exp().sum(-1)
    some = total != 0
    log_total = torch.where(some, total, 1).log() + largest[..., 0]
    return torch.where(some, -eps[:, None] * log_total, torch.inf)


def over(gap: Tensor, eps: Tensor) -> Tensor:
    """gap / ε (B, N, M), where it is −∞ without a gradient: that in ε would be NaN."""
    none = gap == -torch.inf
    return torch.where(none, -torch.inf, torch.where(none, 0, gap) / eps[:, None, None])


def sinkhorn(
    p: Problem, start: Tensor | None, settings: Settings, stops: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f (B, N'), g (B, M'), error (B,), iterations (B,)."""
    C, a, b = p.extended()
    eps = p.epsilon
    return solve(
        lambda g: softmin(C, g, b, eps),
        lambda f: softmin(C.mT, f, a, eps),
        a,
        b,
        eps,
        damping(settings.rho_a, eps, a.shape[1], p.has_row),
        damping(settings.rho_b, eps, b.shape[1], p.has_column),
        start,
        settings,
        stops,
    )


def ratios(C: Tensor, a: Tensor, b: Tensor, eps: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """e (B, N', M'); 0 where there is no pair, and where neither side has weight."""
    exponent = over(f[:, :, None] + g[:, None] - C, eps)
    none = (exponent == -torch.inf) | ((a == 0)[:, :, None] & (b == 0)[:, None])
    return torch.where(none, 0, torch.where(none, 0, exponent).exp())


def plan(p: Problem, f: Tensor, g: Tensor, log: bool) -> Tensor:
    """P or log P, (B, N', M'), in the dtype of the weights."""
    C, a, b = p.extended()
    if not log:
        return a[:, :, None] * b[:, None] * ratios(C, a, b, p.epsilon, f, g)
    exponent = over(f[:, :, None] + g[:, None] - C, p.epsilon)
    total = log_weight(a)[:, :, None] + log_weight(b)[:, None] + exponent
    return torch.where(total.isnan() & ~exponent.isnan(), -torch.inf, total)


def value(p: Problem, f: Tensor, g: Tensor, rho_a: float, rho_b: float) -> Tensor:
    """The dual objective, (B,), where g is the column update of f:

    Σ a φ_a(f) + Σ b φ_b(g) + ε (Σ a Σ b − Σ P),   φ(p) = ρ (1 − e^(−p / ρ)), or p if ρ is infinite.
    """
    _, a, b = p.extended()
    of_a = weighted(a, penalty(f, rho_a, p.has_row))
    of_b = weighted(b, penalty(g, rho_b, p.has_column))
    mass = weighted(b, marginal_ratio(g, rho_b, p.has_column))
    return of_a + of_b + p.epsilon * (total(a) * total(b) - mass)


def penalty(potentials: Tensor, rho: float, border: bool) -> Tensor:
    """φ of each potential."""
    if rho == torch.inf:
        return potentials
    soft = -rho * torch.expm1(-potentials / rho)
    return torch.cat([soft[:, :-1], potentials[:, -1:]], 1) if border else soft


def marginal_ratio(potentials: Tensor, rho: float, border: bool) -> Tensor:
    """φ': the mass that a row of P has, over that which its weight asks for."""
    if rho == torch.inf:
        return torch.where(potentials == -torch.inf, 0.0, torch.ones_like(potentials))
    soft = torch.where(potentials == -torch.inf, 0.0, (-potentials / rho).exp())
    return torch.cat([soft[:, :-1], torch.ones_like(soft[:, -1:])], 1) if border else soft


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """Σ w x, nothing from what has no weight or no potential."""
    return total(torch.where((weight == 0) | x.isinf(), 0, weight * finite(x)))
