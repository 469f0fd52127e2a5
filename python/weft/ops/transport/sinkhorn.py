"""Entropic transport with a matrix of costs."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.checks import values_are_checked
from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.ops.transport import plan as plans
from weft.ops.transport.problem import (
    COUNT,
    DIFFERENTIABLE,
    GRADIENTS,
    SCHEMA,
    arguments_of,
    check_cost,
    check_lengths,
    check_mask,
    check_rho,
    fake_gradients,
    filled,
    marginals,
    positive,
    problem_of,
    refuses_relaxation,
    refuses_translation,
    spread,
    wide_dtype,
)
from weft.ops.transport.result import Transport, register_result
from weft.ops.transport.settings import centered, check_settings, check_start, lowered
from weft.reference.transport import dense, gradients
from weft.reference.transport.dense import Problem
from weft.reference.transport.sinkhorn import Settings, total
from weft.reference.transport.unrolled import sinkhorn_unrolled_backward


@register_result
@dataclass(frozen=True)
class DenseTransport(Transport):
    """The result of :func:`weft.sinkhorn`; ``plan`` is computed each time it is read."""

    constants: ClassVar = ("tolerance", "similarity", "single", "partial")
    cost: Tensor
    a: Tensor
    b: Tensor
    epsilon: Tensor
    mask: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    border: Tensor | None
    similarity: bool
    single: bool  # a problem without a batch dimension
    partial: bool  # the dustbin is not the caller's

    def _of_plan(self, log: bool) -> Tensor:
        p = Problem(*(getattr(self, name) for name in Problem.__dataclass_fields__))
        f, g = (t[None] if self.single else t for t in self.potentials)
        P = plan_of(p, f, g, log)
        if self.partial:
            P = P[:, : self.cost.shape[1], : self.cost.shape[2]]
        return P[0] if self.single else P

    @property
    def plan(self) -> Tensor:
        """P ``(B, N, M)`` in the dtype of the costs; with ``dustbin`` its last row and column are
        the dustbin's. Differentiable in all that the problem is made of, through the potentials."""
        return self._of_plan(False)

    @property
    def log_plan(self) -> Tensor:
        """log P, −∞ where there is no mass."""
        return self._of_plan(True)

    def apply(self, values: Tensor) -> Tensor:
        """P @ values, ``(B, N, E)`` from ``(B, M, E)``."""
        return (self.plan.to(values.dtype)) @ values


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    max_iterations: int = 1000,
    tolerance: float | None = None,
    mask: Tensor | None = None,
    lengths: tuple[Tensor | None, Tensor | None] | None = None,
    rho: float | tuple[float | None, float | None] | None = None,
    mass: float | Tensor | None = None,
    dustbin: float | Tensor | None = None,
    potentials: tuple[Tensor, Tensor] | None = None,
    acceleration: str = "auto",
    schedule: str = "fixed",
    gradient: str = "implicit",
) -> DenseTransport:
    r"""Entropic optimal transport between the rows and the columns of a matrix of costs.

    .. math::
        P = \arg\min_{P \ge 0} \langle P, C \rangle + \varepsilon\,\mathrm{KL}(P \mid a b^\top)
            + \rho_a \mathrm{KL}(P 1 \mid a) + \rho_b \mathrm{KL}(P^\top 1 \mid b), \qquad
        P_{ij} = a_i b_j \exp\frac{f_i + g_j - C_{ij}}{\varepsilon}

    where an infinite ρ makes its marginal a constraint. KL(p | q) is Σ p log(p / q) − p + q.

    Args:
        cost: ``(B, N, M)`` or ``(N, M)``, any strides; +∞ forbids a pair.
        a: weights of the rows, ``(B, N)`` or ``(N,)``, ≥ 0; 1/N each if None. Rows of weight 0 move
            nothing and have a potential all the same.
        b: weights of the columns, likewise. Without ``rho`` both must have the same mass; what
            rounding leaves between them is taken from b, as are its gradients.
        epsilon: ε > 0, in the units of the cost: a number, or a tensor () or (B,), which may
            require a gradient.
        max_iterations: a row and a column update each.
        tolerance: where a problem stops: L1 error of its marginals. None: 1e-6 in float64, else
            1e-5. A negative number: none, all iterations are done.
        mask: bool, broadcastable to the cost, False forbids a pair.
        lengths: how many rows and columns of each problem are real, each ``(B,)`` int64 or None.
            What lies beyond is never read into a result.
        rho: (ρ_a, ρ_b), or one number for both; None for a constraint. (None, 1.0) is semi-relaxed.
        mass: partial transport: of each problem so much is moved, at most what a and b have.
        dustbin: the cost of a row and a column added for what stays unmatched: a number, or a
            tensor () or (B,), which may require a gradient. Each has the mass of all on the other
            side. Potentials and the plan have them last.
        potentials: (f, g) of a similar problem to start from; only g is read.
        acceleration: "auto": over-relaxation, chosen from the rate at which the error falls, where
            a balanced problem is solved to a tolerance; "none": the plain iteration.
        schedule: "anneal" starts from an ε as large as the costs and comes down in 8 steps of 5
            iterations; "fixed" starts with ε.
        gradient: of the potentials and the plan. "implicit": that of the optimum, which the
            iterations have to have reached; "unrolled": that of exactly ``max_iterations``
            iterations, without a tolerance.

    Returns:
        A :class:`DenseTransport`: ``value``, ``plan`` (made when it is read), ``potentials`` (of a
        balanced problem with ⟨a, f⟩ = ⟨b, g⟩), ``marginal_error``, ``iterations``, ``converged``,
        ``apply(values)``; without the batch dimension if the cost has none. All in float32 (float64
        of float64), the plan in the dtype of the cost. Differentiable twice in cost, a, b, epsilon
        and dustbin. A row of positive weight without a finite entry moves nothing: potential −∞,
        a row 0 of the plan, its weight in ``marginal_error``. Where the tolerance is not reached
        there is a :class:`NotConverged` warning; on a GPU when ``converged`` is read.

    Raises:
        ValueError: shapes, devices, weights that are negative, not finite or of different mass,
            epsilon, rho or mass out of range, lengths out of range, unknown options.
        TypeError: dtypes that differ or are not supported.

    Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; Chizat et al., "Scaling Algorithms for
    Unbalanced Optimal Transport Problems", 2018, algorithm 2; the over-relaxation of Thibault et
    al., "Overrelaxed Sinkhorn–Knopp Algorithm for Regularized Optimal Transport", 2021; the dustbin
    of Sarlin et al., "SuperGlue", CVPR 2020, section 3.2.
    """
    single = isinstance(cost, Tensor) and cost.dim() == 2
    cost = check_cost("cost", cost)
    rho_a, rho_b = check_rho(rho)
    balanced = rho_a == rho_b == torch.inf
    lengths = check_lengths(lengths, cost)
    eps = positive("epsilon", epsilon, cost)
    a, b = marginals(a, b, cost, lengths, balanced and mass is None)
    border = None
    if mass is not None or dustbin is not None:
        a, b, border = with_border(cost, a, b, mass, dustbin, balanced)
    p = Problem(cost, a, b, eps, check_mask(mask, cost), *lengths, border, False)
    settings = check_settings(
        cost, max_iterations, tolerance, rho_a, rho_b, acceleration, gradient, border is not None
    )
    if schedule not in ("fixed", "anneal"):
        raise ValueError(f"schedule must be 'fixed' or 'anneal', got {schedule!r}")
    start = check_start(potentials, a, b, single)
    if schedule == "anneal":
        start = annealed(p, start, settings)
    result = solved(p, start, settings, gradient == "unrolled")
    return finish(p, result, settings, single, mass is not None)


def with_border(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    mass: float | Tensor | None,
    dustbin: float | Tensor | None,
    balanced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and the costs with one more row and column, for what is not matched."""
    if mass is not None and dustbin is not None:
        raise ValueError("mass and dustbin exclude each other")
    mass_a, mass_b = total(a), total(b)
    B, wide = cost.shape[0], wide_dtype(cost)
    if mass is None:
        if not isinstance(dustbin, Tensor):
            dustbin = torch.as_tensor(float(dustbin), dtype=wide, device=cost.device)
        if dustbin.shape not in ((), (B,)):
            raise ValueError(f"dustbin must be a number, () or ({B},), got {tuple(dustbin.shape)}")
        border = dustbin.to(wide).expand(B)[:, None].expand(B, 3)
        return torch.cat([a, mass_b[:, None]], 1), torch.cat([b, mass_a[:, None]], 1), border
    if not balanced:
        raise ValueError("mass goes with rho=None: partial transport has no penalties")
    moved = positive("mass", mass, cost, allow_zero=True)
    least = torch.minimum(mass_a, mass_b)
    if values_are_checked(moved) and not bool((moved <= least * (1 + 1e-6)).all()):
        raise ValueError("mass must be at most that of a and that of b")
    moved = torch.minimum(moved, least)
    border = cost.new_tensor([0.0, 0.0, torch.inf], dtype=wide).expand(B, 3)
    a = torch.cat([a, (mass_b - moved)[:, None]], 1)
    return a, torch.cat([b, (mass_a - moved)[:, None]], 1), border


def annealed(p: Problem, start: Tensor | None, settings: Settings) -> Tensor:
    """g after a few iterations at each of several ε from the largest cost down to ε."""
    with torch.no_grad():
        held = Problem(*(t.detach() if isinstance(t, Tensor) else t for t in vars(p).values()))
        C = held.cost.to(p.a.dtype)
        largest = torch.where(C.isfinite(), C.abs(), 0).flatten(1).amax(1) if C[0].numel() else 0

        def run(epsilon: Tensor, g: Tensor | None, few: Settings) -> Tensor:
            return solved(replace(held, epsilon=epsilon), g, few, False)[1]

        return lowered(run, held.epsilon, largest, start, settings)


def solved(
    p: Problem, start: Tensor | None, s: Settings, unrolled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f, g, error and iterations of a checked problem."""
    if transformed():
        if unrolled:
            return dense.sinkhorn(p, start, s, stops=False)
        return gradients.sinkhorn_implicit(p, start, s)
    numbers = (s.rho_a, s.rho_b, s.max_iterations, s.tolerance, s.relax, unrolled)
    return forward(*arguments_of(p), start, *numbers)


def plan_of(p: Problem, f: Tensor, g: Tensor, log: bool = False) -> Tensor:
    """P or log P of the extended problem."""
    if transformed():
        return dense.plan(p, f, g, log).to(p.cost.dtype)
    return plans.plan(*arguments_of(p), f, g, log)


def finish(
    p: Problem, result: tuple[Tensor, ...], s: Settings, single: bool, partial: bool
) -> DenseTransport:
    f, g, error, iterations = result
    if s.rho_a == s.rho_b == torch.inf:
        f, g = centered(f, g, p.a, p.b)
    if transformed():
        value = dense.value(p, f, g, s.rho_a, s.rho_b)
    else:
        value = plans.value(*arguments_of(p), f, g, s.rho_a, s.rho_b)
    tensors = (value, f, g, error, iterations)
    value, f, g, error, iterations = (t[0] for t in tensors) if single else tensors
    found = DenseTransport(
        value, (f, g), error, iterations, s.tolerance, *arguments_of(p), single, partial
    )
    if error.device.type == "cpu" and not transformed():
        found.warn_of_errors()
    return found


def _settings(args: tuple, p: Problem) -> Settings:
    rho_a, rho_b, max_iterations, tolerance, relax = args
    border = p.has_row or p.has_column
    return Settings(rho_a, rho_b, max_iterations, tolerance, relax, border)


def _fake(*args):
    a, b, epsilon = args[1:4]
    f, g, error = a.new_empty(a.shape), b.new_empty(b.shape), epsilon.new_empty(epsilon.shape)
    return f, g, error, epsilon.new_empty(epsilon.shape, dtype=torch.int64)


def _reference(*args):
    p = problem_of(args)
    found = dense.sinkhorn(p, args[COUNT], _settings(args[COUNT + 1 : -1], p))
    return tuple(t.contiguous() for t in found)


def _fake_backward(*args):
    return fake_gradients(args)


def _formula_backward(*args):
    f, g, grad_f, grad_g, rho_a, rho_b = args[COUNT:]
    grads = gradients.sinkhorn_backward(grad_f, grad_g, problem_of(args), f, g, rho_a, rho_b)
    return filled(grads, args)


def _fake_unrolled_backward(*args):
    return *fake_gradients(args), args[2].new_empty(args[2].shape)


def _formula_unrolled_backward(*args):
    start, grad_f, grad_g, rho_a, rho_b, max_iterations = args[COUNT:]
    p = problem_of(args)
    settings = _settings((rho_a, rho_b, max_iterations, -1.0, False), p)
    first = args[2] * 0 if start is None else start
    grads = sinkhorn_unrolled_backward(grad_f, grad_g, p, first, settings)
    return filled(grads, args)


forward = Op(
    "sinkhorn",
    f"({SCHEMA}, Tensor? start, float rho_a, float rho_b, int max_iterations, float tolerance, "
    "bool relax, bool unrolled) -> (Tensor f, Tensor g, Tensor error, Tensor iterations)",
    family="transport",
    fake=_fake,
    implementations=[
        cpu("sinkhorn"),
        triton("transport.sinkhorn", "sinkhorn", refuses_relaxation),
        reference(_reference),
    ],
)
backward = Op(
    "sinkhorn_backward",
    f"({SCHEMA}, Tensor f, Tensor g, Tensor grad_f, Tensor grad_g, float rho_a, float rho_b) -> "
    f"({GRADIENTS})",
    family="transport",
    fake=_fake_backward,
    implementations=[
        cpu("sinkhorn_backward"),
        triton("transport.implicit", "sinkhorn_backward"),
        reference(_formula_backward),
    ],
)
unrolled_backward = Op(
    "sinkhorn_unrolled_backward",
    f"({SCHEMA}, Tensor? start, Tensor grad_f, Tensor grad_g, float rho_a, float rho_b, "
    f"int max_iterations) -> ({GRADIENTS}, Tensor grad_start)",
    family="transport",
    fake=_fake_unrolled_backward,
    implementations=[
        cpu("sinkhorn_unrolled_backward", refuses_translation),
        triton("transport.unrolled", "sinkhorn_unrolled_backward", refuses_translation),
        reference(_formula_unrolled_backward),
    ],
)


def _setup(ctx, inputs, output):
    f, g, error, iterations = output
    ctx.mark_non_differentiable(error, iterations)
    ctx.unrolled, ctx.similarity = inputs[-1], inputs[COUNT - 1]
    ctx.rho, ctx.max_iterations = inputs[COUNT + 1 : COUNT + 3], inputs[COUNT + 3]
    last = (inputs[COUNT],) if ctx.unrolled else (f, g)
    ctx.save_for_backward(*inputs[: COUNT - 1], *last)


def _gradient(ctx, grad_f, grad_g, *_):
    args = (*ctx.saved_tensors[: COUNT - 1], ctx.similarity)
    rest = ctx.saved_tensors[COUNT - 1 :]
    if not ctx.unrolled:
        grads = backward(*args, *rest, grad_f, grad_g, *ctx.rho)
        return spread(grads, args, (None,) * 7)
    *grads, grad_start = unrolled_backward(
        *args, *rest, grad_f, grad_g, *ctx.rho, ctx.max_iterations
    )
    grad_start = None if rest[0] is None else grad_start
    return spread(grads, args, (grad_start, *[None] * 6))


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(
    backward, _formula_backward, arguments=[*DIFFERENTIABLE, *range(COUNT, COUNT + 4)]
)
register_gradient_by_reference(
    unrolled_backward,
    _formula_unrolled_backward,
    arguments=[*DIFFERENTIABLE, *range(COUNT, COUNT + 3)],
)
