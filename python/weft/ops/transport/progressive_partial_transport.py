"""Pseudo-labels for imbalanced clusters: part of the mass is labelled, cluster sizes are free."""

import math
import warnings

import torch
from torch import Tensor

from weft.ops.checks import check_float, values_are_checked
from weft.ops.transport.problem import wide_dtype
from weft.ops.transport.result import NotConverged
from weft.ops.transport.settings import check_settings
from weft.ops.transport.sinkhorn import plan_of, solved
from weft.reference.transport.dense import Problem


@torch.no_grad()
def progressive_partial_transport(
    logits: Tensor,
    mass: float,
    *,
    epsilon: float = 0.1,
    strength: float = 1.0,
    graph: Tensor | None = None,
    graph_strength: float = 0.0,
    max_iterations: int = 1000,
    tolerance: float | None = None,
    outer_iterations: int = 100,
    outer_tolerance: float = 1e-6,
) -> Tensor:
    r"""The plan that gives a part ρ of n samples to K clusters whose sizes it may choose.

    With :math:`C = -\log \operatorname{softmax}(\text{logits})`

    .. math::
        Q = \arg\min_{Q \ge 0} \langle Q, C \rangle - \lambda_1 \langle S, Q Q^\top \rangle
            + \varepsilon \langle Q', \log Q' \rangle
            + \gamma\,\mathrm{KL}(Q^\top 1 \mid \tfrac{\rho}{K} 1), \qquad
        Q 1 \le \tfrac1n 1, \quad 1^\top Q 1 = \rho

    where Q' is Q with a column of cost 0 for what stays without a label: its rows are exactly 1/n
    and that column exactly 1 − ρ. Without ``graph`` (P²OT) this is one semi-relaxed transport
    problem, whose clusters' columns are damped by γ / (γ + ε). With it (SP²OT) the semantic term
    is majorised at the last plan: each outer step solves the problem with C − λ₁ (S + Sᵀ) Q and
    starts from the potentials of the one before.

    Args:
        logits: ``(n, K)``, n, K ≥ 1.
        mass: ρ in (0, 1].
        epsilon: ε > 0, of the entropy of Q'.
        strength: γ > 0, of the clusters' sizes.
        graph: S ``(n, n)``, sparse (COO or CSR) or dense, in the dtype of the logits or its wider
            one: how alike samples are. For a descent of the objective S + Sᵀ must be positive
            semidefinite.
        graph_strength: λ₁ > 0, 0 without a graph; the paper begins at 1000 and has 1000 (1 − ρ).
        max_iterations, tolerance: of each transport problem, as in ``weft.sinkhorn``.
        outer_iterations: at most so many transport problems where there is a graph.
        outer_tolerance: they end when the plan's L1 change is at most this. Reading it waits for
            the device; a negative number does all of them.

    Returns:
        Q, ``(n, K)`` in the dtype of the logits; n Q are soft labels whose rows sum to at most 1.
        Labels are targets: there is no gradient. On a CPU a problem that misses its tolerance gives
        a ``NotConverged`` warning.

    Raises:
        ValueError: shapes, numbers out of range, a graph without a strength or the reverse.
        TypeError: dtypes that are not supported.

    Source: Zhang, Ren and He, "P²OT: Progressive Partial Optimal Transport for Deep Imbalanced
    Clustering", ICLR 2024, sections 4.2 and 4.3; "SP²OT: Semantic-Regularized Progressive Partial
    Optimal Transport for Imbalanced Clustering", 2024. Published code stops the outer steps by the
    change of the objective.
    """
    check_float(logits=logits)
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"logits must be (n, K), n and K >= 1, got {tuple(logits.shape)}")
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}")
    for name, value in (("epsilon", epsilon), ("strength", strength)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    if not isinstance(outer_iterations, int) or outer_iterations < 1:
        raise ValueError(f"outer_iterations must be an integer >= 1, got {outer_iterations!r}")
    fits = graph_strength == 0 if graph is None else 0 < graph_strength < math.inf
    if not fits:
        raise ValueError(
            f"graph_strength must be > 0 with a graph, 0 without one, got {graph_strength}"
        )
    wide, (n, K) = wide_dtype(logits), logits.shape
    pull = None if graph is None else both_ways(graph, logits)
    log_probabilities = logits.to(wide).log_softmax(1)
    a = log_probabilities.new_full((1, n), 1 / n)
    b = log_probabilities.new_full((1, K), mass / K)
    border = None
    if mass < 1:
        # weft measures entropy against a bᵀ: this cost gives the last column the clusters' weight.
        b = torch.cat([b, b.new_full((1, 1), 1 - mass)], 1)
        border = b.new_tensor([epsilon * math.log((1 - mass) * K / mass), 0.0, 0.0])[None]
    eps = a.new_full((1,), epsilon)
    settings = check_settings(
        logits,
        max_iterations,
        tolerance,
        math.inf,
        float(strength),
        "none",
        "implicit",
        border is not None,
    )

    def solve(scores: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        p = Problem(scores[None], a, b, eps, None, None, None, border, True)
        f, g, error, _ = solved(p, start, settings, False)
        missed = 0 <= settings.tolerance and values_are_checked(error)
        if missed and bool((error > settings.tolerance).any()):
            warnings.warn(
                f"progressive_partial_transport: marginal error {float(error):.3g} after "
                f"{max_iterations} iterations, tolerance {settings.tolerance:g}",
                NotConverged,
                stacklevel=4,
            )
        return plan_of(p, f, g)[0, :, :K], g

    if pull is None:
        return solve(log_probabilities, None)[0].to(logits.dtype).contiguous()
    plan, g = torch.full_like(log_probabilities, mass / (n * K)), None
    for _ in range(outer_iterations):
        before = plan
        plan, g = solve(log_probabilities + graph_strength * (pull @ before), g)
        if outer_tolerance >= 0 and float((plan - before).abs().sum()) <= outer_tolerance:
            break
    return plan.to(logits.dtype).contiguous()


def both_ways(graph: Tensor, logits: Tensor) -> Tensor:
    """S + Sᵀ, sparse where S is."""
    n, wide = logits.shape[0], wide_dtype(logits)
    if not isinstance(graph, Tensor) or graph.dtype not in (logits.dtype, wide):
        raise TypeError(
            f"graph must be {logits.dtype} or {wide}, got {getattr(graph, 'dtype', type(graph))}"
        )
    if graph.shape != (n, n) or graph.device != logits.device:
        raise ValueError(
            f"graph must be ({n}, {n}) on {logits.device}, "
            f"got {tuple(graph.shape)} on {graph.device}"
        )
    if graph.layout == torch.strided:
        return graph.to(wide) + graph.to(wide).mT
    entries = graph.to_sparse_coo().coalesce().to(wide)
    return (entries + entries.t()).coalesce()
