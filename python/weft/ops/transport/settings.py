"""What the solvers share around the iteration: its settings, where it starts, how ε comes down."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from weft.reference.transport.sinkhorn import Settings, finite, repeated, total

ANNEALING_LEVELS, ANNEALING_ITERATIONS = 8, 5


def check_settings(
    cost: Tensor,
    max_iterations: int,
    tolerance: float | None,
    rho_a: float,
    rho_b: float,
    acceleration: str,
    gradient: str,
    has_border: bool,
) -> Settings:
    if acceleration not in ("auto", "none"):
        raise ValueError(f"acceleration must be 'auto' or 'none', got {acceleration!r}")
    if gradient not in ("implicit", "unrolled"):
        raise ValueError(f"gradient must be 'implicit' or 'unrolled', got {gradient!r}")
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations must be an integer ≥ 1, got {max_iterations!r}")
    if gradient == "unrolled":
        if tolerance is not None and tolerance >= 0:
            raise ValueError("tolerance must be None with gradient='unrolled'")
        tolerance = -1.0
    if tolerance is None:
        tolerance = 1e-6 if cost.dtype == torch.float64 else 1e-5
    relax = acceleration == "auto" and rho_a == rho_b == torch.inf and tolerance >= 0
    return Settings(rho_a, rho_b, max_iterations, float(tolerance), relax, has_border)


def check_start(potentials, a: Tensor, b: Tensor, single: bool) -> Tensor | None:
    """g to start from."""
    if potentials is None:
        return None
    if not isinstance(potentials, tuple | list) or len(potentials) != 2:
        raise TypeError("potentials must be a pair of tensors (f, g)")
    for name, given, like in zip("fg", potentials, (a, b), strict=True):
        shape = like.shape[1:] if single else like.shape
        if not isinstance(given, Tensor) or given.shape != shape:
            raise ValueError(
                f"potentials: {name} must be {tuple(shape)}, got {getattr(given, 'shape', given)}"
            )
    g = potentials[1].to(b.dtype)
    return g[None] if single else g


def lowered(
    run: Callable[[Tensor, Tensor | None, Settings], Tensor],
    epsilon: Tensor,
    largest: Tensor | float,
    start: Tensor | None,
    settings: Settings,
) -> Tensor:
    """g, which ``run`` gives for an ε and the g before it."""
    few = replace(settings, max_iterations=ANNEALING_ITERATIONS, tolerance=-1.0, relax=False)
    ratio = (largest / epsilon).clamp_min(1)
    g = start
    for level in range(ANNEALING_LEVELS):
        g = run(epsilon * ratio ** (1 - level / ANNEALING_LEVELS), g, few)
    return g


def centered(f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of the potentials f + c, g − c, all as good, those with ⟨a, f⟩ = ⟨b, g⟩: a function of the
    problem."""
    mass = total(a) + total(b)
    difference = total(b * finite(g)) - total(a * finite(f))
    shift = difference / torch.where(mass > 0, mass, 1)
    moved_f, moved_g = f + repeated(shift, f.shape[1]), g - repeated(shift, g.shape[1])
    return torch.where(f.isinf(), f, moved_f), torch.where(g.isinf(), g, moved_g)
