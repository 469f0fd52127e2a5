"""The debiased Sinkhorn divergence between two clouds of points."""

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.transport.points_solver import solved
from weft.ops.transport.problem import check_lengths, check_rho, marginals, positive
from weft.ops.transport.result import Transport
from weft.ops.transport.settings import check_settings
from weft.ops.transport.sinkhorn_points import (
    check_points,
    check_precision,
    pairs_of,
    prepared,
    with_matrix,
)
from weft.reference.transport.sinkhorn import Settings
from weft.reference.transport.sinkhorn_points import Points


def sinkhorn_divergence(
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
    rho: float | None = None,
    acceleration: str = "auto",
    precision: str = "fp32",
) -> Tensor:
    r"""The Sinkhorn divergence: entropic transport without its bias towards small clouds.

    .. math::
        S(x a, y b) = \mathrm{OT}(x a, y b) - \tfrac12 \mathrm{OT}(x a, x a)
            - \tfrac12 \mathrm{OT}(y b, y b) + \tfrac\varepsilon2 \Big(\sum a - \sum b\Big)^2

    with the value OT of :func:`weft.sinkhorn_points`. It is ≥ 0, and 0 where the clouds are equal,
    for all of its costs. The transport of a cloud with itself has one potential, which the averaged
    symmetric update finds in few iterations; that of y starts the one between the clouds. No matrix
    of costs is made.

    Args:
        x, y, a, b, cost, epsilon, max_iterations, tolerance, lengths, acceleration, precision: as
            of :func:`weft.sinkhorn_points`.
        rho: None for constraints, or the strength ρ of both marginals: a cloud and itself are to be
            treated alike.

    Returns:
        ``(B,)``, or () of clouds without a batch dimension, in float32 (float64 of float64).
        Differentiable twice in x, y, a, b and epsilon, with a gradient of 0 where the clouds are
        equal. A problem that misses the tolerance warns (:class:`NotConverged`), on the CPU only.

    Raises:
        ValueError: as :func:`weft.sinkhorn_points`; a pair in place of rho.
        TypeError: dtypes that differ or are not supported.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences", AISTATS 2019, equation 3; Séjourné et al., "Sinkhorn Divergences for Unbalanced
    Optimal Transport", 2019, definition 5.
    """
    single = isinstance(x, Tensor) and x.dim() == 2
    x, y = check_points(x, y)
    check_precision(precision)
    if isinstance(rho, tuple | list):
        raise ValueError(f"rho must be None or one number, got {rho!r}")
    pairs = pairs_of(x, y)
    rho, _ = check_rho(rho)
    rows, columns = check_lengths(lengths, pairs)
    eps = positive("epsilon", epsilon, pairs)
    a, b = marginals(a, b, pairs, (rows, columns), rho == torch.inf)
    settings = check_settings(
        pairs, max_iterations, tolerance, rho, rho, acceleration, "implicit", False
    )
    x, y = prepared(x, y, (rows, columns), cost)
    both = Points(x, y, eps, rows, columns, cost, precision)
    of_x, of_y = (Points(p, p, eps, n, n, cost, precision) for p, n in ((x, rows), (y, columns)))
    self_x, _ = value_of(of_x, a, a, None, settings, True)
    self_y, start = value_of(of_y, b, b, None, settings, True)
    between, _ = value_of(both, a, b, start, settings, False)
    result = between - (self_x + self_y) / 2
    if rho < torch.inf:
        result = result + eps / 2 * (a.sum(1) - b.sum(1)).square()
    return result[0] if single else result


def value_of(
    p: Points, a: Tensor, b: Tensor, start: Tensor | None, settings: Settings, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """The value, and g to start another problem from."""
    if transformed():
        return with_matrix(p, a, b, None, settings, "fixed", False, False).value, None
    value, f, g, error, iterations = solved(p, a, b, start, settings, symmetric)
    if error.device.type == "cpu":
        Transport(value, (f, g), error, iterations, settings.tolerance).warn_of_errors()
    return value, g.detach()
