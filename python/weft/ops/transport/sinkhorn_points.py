"""Entropic transport between two clouds of points, without their matrix of costs."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.dispatch import transformed
from weft.ops.checks import check_float
from weft.ops.transport import sinkhorn as matrices
from weft.ops.transport.points import arguments_of, cost_matrix, product
from weft.ops.transport.points_solver import dual_value, iterate, solved
from weft.ops.transport.problem import check_lengths, check_rho, marginals, positive, wide_dtype
from weft.ops.transport.result import Transport, register_result
from weft.ops.transport.settings import centered, check_settings, check_start, lowered
from weft.reference.transport import sinkhorn_points as formulas
from weft.reference.transport.dense import Problem, real_entries
from weft.reference.transport.sinkhorn import Settings
from weft.reference.transport.sinkhorn_points import Points

COSTS = ("sqeuclidean", "euclidean", "cosine", "dot")
PRECISIONS = ("fp32", "tf32x3", "tf32")
MEMORY_BUDGET = 1 << 29
MANY = 128  # coordinates: a matrix that fits is then faster than its pairs again and again
SMALL = 1 << 18  # entries of a matrix that costs less than to do without


@register_result
@dataclass(frozen=True)
class PointsTransport(Transport):
    """The result of :func:`weft.sinkhorn_points`; ``plan`` is computed when it is asked for."""

    constants: ClassVar = ("tolerance", "cost", "precision", "single")
    x: Tensor
    y: Tensor
    epsilon: Tensor
    rows: Tensor | None
    columns: Tensor | None
    cost: str
    precision: str
    a: Tensor
    b: Tensor
    single: bool  # a problem without a batch dimension

    def _batched_potentials(self) -> list[Tensor]:
        return [t[None] if self.single else t for t in self.potentials]

    def _of_plan(self, log: bool) -> Tensor:
        C = cost_matrix(self.x, self.y, self.cost)
        p = Problem(C, self.a, self.b, self.epsilon, None, self.rows, self.columns, None, False)
        P = matrices.plan_of(p, *self._batched_potentials(), log)
        return P[0] if self.single else P

    @property
    def plan(self) -> Tensor:
        """P ``(B, N, M)``, computed each time it is read: as much memory as the matrix of costs
        has. Differentiable in all that the problem is made of, through the potentials."""
        return self._of_plan(False)

    @property
    def log_plan(self) -> Tensor:
        """log P, −∞ where there is no mass."""
        return self._of_plan(True)

    def apply(self, values: Tensor) -> Tensor:
        """P @ values, ``(B, N, E)`` from ``(B, M, E)``, without the plan."""
        right = values[None] if self.single else values
        right = right.to(self.a.dtype)
        if self.columns is not None:
            right = masked(right, self.columns)
        p = Points(self.x, self.y, self.epsilon, self.rows, self.columns, self.cost, self.precision)
        right = (self.b[..., None] * right).contiguous()
        moved = product(*arguments_of(p), *self._batched_potentials(), right)
        result = (self.a[..., None] * moved).to(values.dtype)
        return result[0] if self.single else result


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: str = "sqeuclidean",
    epsilon: float | Tensor,
    max_iterations: int = 1000,
    tolerance: float | None = None,
    lengths: tuple[Tensor | None, Tensor | None] | None = None,
    rho: float | tuple[float | None, float | None] | None = None,
    potentials: tuple[Tensor, Tensor] | None = None,
    acceleration: str = "auto",
    schedule: str = "fixed",
    gradient: str = "implicit",
    memory_budget: int | None = None,
    precision: str = "fp32",
) -> Transport:
    r"""Entropic optimal transport between two clouds of points: :func:`weft.sinkhorn` with
    :math:`C_{ij} = c(x_i, y_j)`, in memory that grows with N + M.

    .. math::
        P = \arg\min_{P \ge 0} \sum_{ij} P_{ij}\,c(x_i, y_j)
            + \varepsilon\,\mathrm{KL}(P \mid a b^\top)
            + \rho_a \mathrm{KL}(P 1 \mid a) + \rho_b \mathrm{KL}(P^\top 1 \mid b)

    Costs: "sqeuclidean" ‖x − y‖² (without ½), "euclidean" ‖x − y‖, "cosine" 1 − cos(x, y) (of a
    vector 0: 1), "dot" −⟨x, y⟩. For distances all points are moved by their mean, and up to 8
    coordinates are compared by their differences: a translation changes nothing, and a small ε
    keeps its digits.

    Each update computes all costs again, tile by tile. The matrix of costs is made in place of that
    where it is faster, beyond 128 coordinates or of up to 2¹⁸ pairs, and where it fits
    ``memory_budget``.

    Args:
        x: points ``(B, N, D)`` or ``(N, D)``, any strides.
        y: points ``(B, M, D)`` or ``(M, D)``, of the dtype of x.
        a, b: weights of the points, ``(B, N)`` or ``(N,)`` and ``(B, M)`` or ``(M,)``, ≥ 0; 1/N and
            1/M each if None. Without ``rho`` both must have the same mass.
        cost: one of those above.
        epsilon: ε > 0, in the units of the cost: a number, or a tensor () or (B,), which may
            require a gradient.
        max_iterations, tolerance, rho, potentials, acceleration: as of :func:`weft.sinkhorn`.
        lengths: how many points of each problem are real, (of x, of y), each ``(B,)`` int64 or
            None. What lies beyond is never read into a result.
        schedule: "anneal" starts from an ε as large as the costs and comes down in 8 steps of 5
            iterations; "fixed" starts with ε.
        gradient: of the potentials and the plan. "implicit": that of the optimum, which the
            iterations have to have reached; "unrolled": that of exactly ``max_iterations``
            iterations, without a tolerance, in memory that grows with their number.
        memory_budget: bytes that matrices of costs, and their gradients, may take; 2²⁹ if None,
            0 for none of them.
        precision: of the products of float32 coordinates on a GPU: "fp32", "tf32x3" (three products
            in TF32, nearly as exact), "tf32" (about three digits: for a large ε).

    Returns:
        A :class:`Transport`: ``value``, ``potentials`` (of a balanced problem with
        ⟨a, f⟩ = ⟨b, g⟩), ``marginal_error``, ``iterations``, ``converged``; ``apply(values)`` and
        ``plan_label_joint``, which need no plan; ``plan``, made when it is read. Without the batch
        dimension if x and y have none. All in float32 (float64 of float64). Differentiable twice in
        x, y, a, b and epsilon; where a distance is 0, its gradient is taken as 0. Where the
        tolerance is not reached there is a :class:`NotConverged` warning; on a GPU when
        ``converged`` is read.

    Raises:
        ValueError: shapes, devices, weights that are negative, not finite or of different mass,
            epsilon or rho out of range, lengths out of range, unknown options.
        TypeError: dtypes that differ or are not supported.

    Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; Feydy et al., "Interpolating between Optimal
    Transport and MMD using Sinkhorn Divergences", AISTATS 2019, for soft minima of clouds.
    """
    single = isinstance(x, Tensor) and x.dim() == 2
    x, y = check_points(x, y)
    check_precision(precision)
    if schedule not in ("fixed", "anneal"):
        raise ValueError(f"schedule must be 'fixed' or 'anneal', got {schedule!r}")
    pairs = pairs_of(x, y)
    rho_a, rho_b = check_rho(rho)
    lengths = check_lengths(lengths, pairs)
    eps = positive("epsilon", epsilon, pairs)
    a, b = marginals(a, b, pairs, lengths, rho_a == rho_b == torch.inf)
    settings = check_settings(
        pairs, max_iterations, tolerance, rho_a, rho_b, acceleration, gradient, False
    )
    start = check_start(potentials, a, b, single)
    x, y = prepared(x, y, lengths, cost)
    p = Points(x, y, eps, *lengths, cost, precision)
    unrolled = gradient == "unrolled"
    if transformed() or materialises(p, memory_budget):
        return with_matrix(p, a, b, start, settings, schedule, unrolled, single)
    if schedule == "anneal":
        start = annealed(p, a, b, start, settings)
    if unrolled:
        f, g, error, iterations = iterate(p, a, b, start, settings, stops=False)
        value = dual_value(eps, a, b, f, g, rho_a, rho_b)
    else:
        value, f, g, error, iterations = solved(p, a, b, start, settings)
    return finish(p, a, b, (value, f, g, error, iterations), settings, single)


def check_points(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, n, D)."""
    check_float(x=x, y=y)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be (B, N, D) or (N, D), got {tuple(x.shape)}")
    shape = (*x.shape[:-2], "M", x.shape[-1])
    if y.dim() != x.dim() or y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"y must be ({wanted}) as x is {tuple(x.shape)}, got {tuple(y.shape)}")
    return (x, y) if x.dim() == 3 else (x[None], y[None])


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")


def pairs_of(x: Tensor, y: Tensor) -> Tensor:
    """What the checks of a matrix of costs look at: its shape, dtype and device."""
    return x.new_zeros(()).expand(x.shape[0], x.shape[1], y.shape[1])


def masked(points: Tensor, lengths: Tensor) -> Tensor:
    """0 beyond the lengths, whatever is there."""
    return torch.where(real_entries(lengths, points.shape[1], False)[..., None], points, 0)


def prepared(
    x: Tensor, y: Tensor, lengths: tuple[Tensor | None, Tensor | None], cost: str
) -> tuple[Tensor, Tensor]:
    """The points as the ops want them: in the dtype of sums, 0 beyond the lengths, unit vectors for
    cosines, and for distances moved to the origin, as products lose digits elsewhere."""
    if cost not in COSTS:
        raise ValueError(f"cost must be one of {COSTS}, got {cost!r}")
    wide = wide_dtype(x)
    points = [
        p.to(wide) if n is None else masked(p.to(wide), n)
        for p, n in zip((x, y), lengths, strict=True)
    ]
    if cost == "cosine":
        points = [F.normalize(p, dim=-1) for p in points]
    elif cost != "dot":
        center = mean_of(points, lengths)
        points = [
            p - center if n is None else masked(p - center, n)
            for p, n in zip(points, lengths, strict=True)
        ]
    return points[0].contiguous(), points[1].contiguous()


def mean_of(points: list[Tensor], lengths: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """(B, 1, D): the mean of all points, constant: summed in float64 and rounded to float32, so
    that the order of the sum, and so padding, does not show."""
    total, count = 0, 0
    for p, n in zip(points, lengths, strict=True):
        total = total + p.detach().double().sum(1, keepdim=True)
        count = count + (p.shape[1] if n is None else n[:, None, None])
    count = count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
    return (total / count).to(torch.float32).to(points[0].dtype)


def materialises(p: Points, memory_budget: int | None) -> bool:
    """Whether the matrix of costs is made."""
    if memory_budget is None:
        memory_budget = MEMORY_BUDGET
    elif not isinstance(memory_budget, int) or memory_budget < 0:
        raise ValueError(f"memory_budget must be an integer ≥ 0 or None, got {memory_budget!r}")
    (B, N, D), M = p.x.shape, p.y.shape[1]
    copies = 2 if torch.is_grad_enabled() and (p.x.requires_grad or p.y.requires_grad) else 1
    fits = memory_budget > 0 and copies * B * N * M * p.x.element_size() <= memory_budget
    return bool(fits and (D > MANY or N * M <= SMALL))


def with_matrix(
    p: Points,
    a: Tensor,
    b: Tensor,
    start: Tensor | None,
    settings: Settings,
    schedule: str,
    unrolled: bool,
    single: bool,
) -> Transport:
    """The same by the ops on matrices of costs."""
    make = formulas.cost_matrix if transformed() else cost_matrix
    full = Problem(make(p.x, p.y, p.cost), a, b, p.epsilon, None, p.rows, p.columns, None, False)
    if schedule == "anneal":
        start = matrices.annealed(full, start, settings)
    result = matrices.solved(full, start, settings, unrolled)
    return matrices.finish(full, result, settings, single, False)


def annealed(
    p: Points, a: Tensor, b: Tensor, start: Tensor | None, settings: Settings
) -> Tensor | None:
    """g after a few iterations at each of several ε from about the largest cost down to ε."""
    with torch.no_grad():
        norms = [
            t.norm(dim=2).amax(1) if t.shape[1] else t.new_zeros(t.shape[0]) for t in (p.x, p.y)
        ]
        largest = norms[0] + norms[1]
        if p.cost in ("cosine", "dot"):
            largest = norms[0] * norms[1] * (2 if p.cost == "cosine" else 1)
        elif p.cost == "sqeuclidean":
            largest = largest.square()

        def run(epsilon: Tensor, g: Tensor | None, few: Settings) -> Tensor:
            return solved(replace(p, epsilon=epsilon), a, b, g, few)[2]

        return lowered(run, p.epsilon, largest, start, settings)


def finish(
    p: Points, a: Tensor, b: Tensor, result: tuple[Tensor, ...], s: Settings, single: bool
) -> PointsTransport:
    value, f, g, error, iterations = result
    if s.rho_a == s.rho_b == torch.inf:
        f, g = centered(f, g, a, b)
    tensors = (value, f, g, error, iterations)
    value, f, g, error, iterations = (t[0] for t in tensors) if single else tensors
    found = PointsTransport(
        value, (f, g), error, iterations, s.tolerance, *arguments_of(p), a, b, single
    )
    if error.device.type == "cpu":
        found.warn_of_errors()
    return found
