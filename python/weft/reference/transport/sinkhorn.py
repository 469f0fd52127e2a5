"""Sinkhorn's iterations in the log domain, for any cost that can give soft minima.

The problem: P minimises ⟨P, C⟩ + ε KL(P | a bᵀ) + ρ_a KL(P 1 | a) + ρ_b KL(Pᵀ 1 | b), an infinite ρ
being a constraint. P_ij = a_i b_j e^((f_i + g_j − C_ij) / ε), and with λ = ρ / (ρ + ε)

    f_i ← −λ_a ε log Σ_j b_j e^((g_j − C_ij) / ε)      g_j ← −λ_b ε log Σ_i a_i e^((f_i − C_ij) / ε)

A row without a finite entry of positive weight has f_i = −∞ and moves nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHECK = 20  # iterations between decisions on the relaxation
STALLED = 0.95  # of the error over so many iterations is no progress
LARGEST_FACTOR, CAUTION = 1.97, 0.9


@dataclass(frozen=True)
class Settings:
    """``tolerance`` < 0 runs all iterations; ``relax`` allows factors above 1."""

    rho_a: float
    rho_b: float
    max_iterations: int
    tolerance: float
    relax: bool
    has_border: bool = False


def solve(
    softmin_rows: Callable[[Tensor], Tensor],
    softmin_columns: Callable[[Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    damping_a: Tensor,
    damping_b: Tensor,
    start: Tensor | None,
    settings: Settings,
    stops: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f (B, N), g (B, M), error (B,), iterations (B,) int64.

    ``softmin_rows(g)`` is −ε log Σ_j b_j e^((g_j − C_ij) / ε), +∞ where nothing is summed;
    ``damping_*`` are the λ of each row and column. The error is the L1 distance of the marginals of
    the plan of (f, g before its update): the rows are met exactly unless relaxed, the columns are
    those that the update changes; that of (f, g) itself is no larger. Each problem of the batch
    stops by itself; without ``stops`` the loop asks no tensor for a number.

    Relaxation: f ← f + ω (f* − f) and g alike, ω chosen every CHECK iterations (next_factor).
    """
    eps = epsilon[:, None]
    s = settings
    g = torch.zeros_like(b) if start is None else start
    f = torch.zeros_like(a)
    one = torch.ones_like(epsilon)
    error, active = torch.full_like(epsilon, torch.inf), torch.ones_like(epsilon, dtype=torch.bool)
    iterations = torch.zeros_like(epsilon, dtype=torch.int64)
    omega, cap, halfway, checked = one, one * LARGEST_FACTOR, error, error
    for count in range(1, s.max_iterations + 1):
        best_f = potential(softmin_rows(g), damping_a)
        new_f = relaxed(f, best_f, omega) if s.relax else best_f
        best_g = potential(softmin_columns(new_f), damping_b)
        new_g = relaxed(g, best_g, omega) if s.relax else best_g
        if s.rho_a < torch.inf and s.rho_b < torch.inf and not s.has_border:
            new_f, new_g = translated(new_f, new_g, a, b, s.rho_a, s.rho_b)
            best_g = new_g
        new_error = change(g, best_g, b, eps)
        if s.relax:
            new_error = torch.maximum(new_error, change(new_f, best_f, a, eps))
        f = torch.where(active[:, None], new_f, f)
        g = torch.where(active[:, None], new_g, g)
        error = torch.where(active, new_error, error)
        iterations = iterations + active
        if s.tolerance >= 0:
            met = error <= s.tolerance
            active = active & ~(met & (omega == 1))
            omega = torch.where(met, one, omega)
            if count % CHECK == CHECK // 2:
                halfway = error
            if count % CHECK == 0:
                floor = torch.finfo(a.dtype).eps * (16 + 2 * largest(g) / epsilon)
                active = active & ~((error > STALLED * checked) & (error <= floor))
                if s.relax:
                    rate = (error / halfway) ** (2 / CHECK)
                    omega, cap = next_factor(omega, cap, torch.where(met, torch.inf, rate))
                checked = error
            if stops and not active.any():
                break
    return f, g, error, iterations


def next_factor(omega: Tensor, cap: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """The next relaxation factor, and the largest one allowed.

    Near the optimum the iteration is linear, and over-relaxation by ω turns the rate μ² of the
    plain one into r with (r + ω − 1)² = r ω² μ²; the best factor is 2 / (1 + √(1 − μ²)). It is only
    raised, as the slowest mode shows last. An error that grew sets ω to 1 and lowers the cap.

    Source: Young, "Iterative Solution of Large Linear Systems", 1971, chapter 6."""
    grew = rate >= 1
    squared = (rate + omega - 1) ** 2 / (rate * omega**2)
    known = ~grew & (rate > omega - 1)
    best = torch.minimum(2 / (1 + (1 - squared.clamp(0, 1)).sqrt()), cap)
    raised = torch.where(known, torch.maximum(omega, best), omega)
    lowered = torch.where(grew & (omega > 1), 1 + CAUTION * (cap - 1), cap)
    return torch.where(grew, 1.0, raised), lowered


def potential(softmin: Tensor, damping: Tensor) -> Tensor:
    """λ softmin, and −∞, a constant, in place of the +∞ of an empty sum."""
    empty = softmin == torch.inf
    return torch.where(empty, -torch.inf, damping * torch.where(empty, 0, softmin))


def relaxed(old: Tensor, best: Tensor, omega: Tensor) -> Tensor:
    moved = finite(old) + omega[:, None] * (finite(best) - finite(old))
    return torch.where((omega[:, None] == 1) | best.isinf(), best, moved)


def translated(
    f: Tensor, g: Tensor, a: Tensor, b: Tensor, rho_a: float, rho_b: float
) -> tuple[Tensor, Tensor]:
    """The best (f + t, g − t) of an unbalanced problem; points far away need it to converge.

    Source: Séjourné, Vialard and Peyré, "Faster Unbalanced Optimal Transport: Translation invariant
    Sinkhorn and 1-D Frank-Wolfe", 2022."""
    mass = lambda w, p, rho: torch.logsumexp(log_weight(w) - finite(p) / rho, -1)  # noqa: E731
    shift = rho_a * rho_b / (rho_a + rho_b) * (mass(a, f, rho_a) - mass(b, g, rho_b))
    shift = finite(shift)[:, None]
    return f + shift, g - shift


def change(old: Tensor, new: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Σ w |e^((old − new) / ε) − 1|: what a constraint is missed by; all of w where p is −∞."""
    missed = torch.expm1((finite(old) - finite(new)) / eps).abs()
    missed = torch.where(new == -torch.inf, 1, missed)
    return total(torch.where(weight > 0, weight * missed, 0))


def total(x: Tensor) -> Tensor:
    """The sum over the last dimension in its order: zeros after the end change no bit of it."""
    return torch.nn.functional.pad(x, (0, 1)).cumsum(-1)[..., -1]


def repeated(x: Tensor, count: int) -> Tensor:
    """(B, count) copies of x (B,), whose gradient is a ``total``."""
    return torch.nn.functional.pad(x[:, None], (0, count - 1)).cumsum(-1)


def finite(x: Tensor) -> Tensor:
    """0 in place of infinities: where a potential is −∞ there is nothing to count."""
    return torch.where(x.isinf(), 0, x)


def largest(x: Tensor) -> Tensor:
    """max |x|, (B,); 0 of nothing."""
    return finite(x).abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[0])


def log_weight(weight: Tensor) -> Tensor:
    """log w; −∞ without a gradient where w is 0."""
    some = weight != 0
    return torch.where(some, torch.where(some, weight, 1).log(), -torch.inf)


def damping(rho: float, epsilon: Tensor, count: int, border: bool) -> Tensor:
    """λ of each of ``count`` rows or columns, (B, count); the last is exact if it is a dustbin."""
    eps = epsilon[:, None]
    factor = torch.ones_like(eps) if rho == torch.inf else rho / (rho + eps)
    factor = factor.expand(-1, count)
    return torch.cat([factor[:, :-1], torch.ones_like(eps)], 1) if border else factor
