"""Cases of the debiased divergence between clouds."""

from weft.ops.cases import OpCases
from weft.ops.transport.cases.sinkhorn_points import (
    BAD,
    FIXED,
    bad,
    plain_sinkhorn_points,
    sample,
    workload,
)


def plain_sinkhorn_divergence(
    x,
    y,
    a=None,
    b=None,
    *,
    cost="sqeuclidean",
    epsilon,
    max_iterations=1000,
    tolerance=None,
    lengths=None,
    rho=None,
    acceleration="auto",
    precision="fp32",
):
    """Three problems, the clouds' own by alternating updates too."""
    rows, columns = lengths or (None, None)
    if rho is None and a is not None and b is not None:
        b = b * (a.sum(-1) / b.sum(-1))[..., None]
    total, masses = 0, []
    for p, q, of_p, of_q, m, n, factor in (
        (x, y, a, b, rows, columns, 1),
        (x, x, a, a, rows, rows, -0.5),
        (y, y, b, b, columns, columns, -0.5),
    ):
        value, *_ = plain_sinkhorn_points(
            p,
            q,
            of_p,
            of_q,
            cost=cost,
            epsilon=epsilon,
            max_iterations=max_iterations,
            lengths=None if m is None else (m, n),
            rho=None if rho is None else (rho, rho),
        )
        total = total + factor * value
        masses.append(1 if of_p is None else of_p.sum(-1))
    if rho is not None:
        total = total + epsilon / 2 * (masses[0] - masses[2]) ** 2
    return total


SAMPLES = [
    sample("plain", 2, 13, 21, 3, given=FIXED),
    sample("unbalanced", 3, 14, 9, 9, epsilon=2.0, rho=2.0, given=FIXED),
    sample(
        "few_steps", 1, 12, 13, 9, epsilon=2.0, given=FIXED, max_iterations=20, interpreted=True
    ),
]


SINKHORN_DIVERGENCE = OpCases(
    name="sinkhorn_divergence",
    plain=plain_sinkhorn_divergence,
    samples=SAMPLES,
    workloads=[
        workload(500, 700, 16, 10, quick=True, given=FIXED),
        workload(4096, 4096, 64, 10, given=FIXED),
    ],
    bad=[*BAD, bad(ValueError, "one number", rho=(1.0, None))],
)

CASES = [SINKHORN_DIVERGENCE]
