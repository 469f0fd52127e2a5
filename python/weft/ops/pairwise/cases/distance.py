"""Cases of the matrix of distances."""

import torch
from torch.nn import functional as F

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn
from weft.ops.pairwise.cases.nearest import _rows as rows


def plain_pairwise_distance(
    x, y, metric="sqeuclidean", *, curvature=1.0, precision=None, plan="auto"
):
    """By expanded squares, as is usual; by ``torch.cdist`` where it has the metric."""
    squares = lambda x, y: (  # noqa: E731
        (x.square().sum(-1)[:, None] + y.square().sum(-1) - 2 * x @ y.mT).clamp_min(0)
    )
    if metric == "sqeuclidean":
        return squares(x, y)
    if metric == "cosine":
        return 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    if metric == "l1":
        return (x[:, None] - y[None]).abs().sum(-1)
    if metric == "poincare":
        room = (1 - curvature * x.square().sum(-1))[:, None] * (1 - curvature * y.square().sum(-1))
        s = 2 * curvature * squares(x, y) / room
        return torch.acosh(1 + s) / curvature**0.5
    if metric == "lorentz":
        product = x[:, 1:] @ y[:, 1:].mT - x[:, :1] * y[:, 0]
        return torch.acosh((-curvature * product).clamp_min(1)) / curvature**0.5
    if metric == "mahalanobis":
        factor = torch.linalg.cholesky(precision.double()).to(x.dtype)
        x, y = x @ factor, y @ factor
    return squares(x, y).sqrt()


def on_hyperboloid(N, M, D, curvature):
    """Points with ⟨x, x⟩_L = −1/c, in the dtype of the call up to its rounding."""

    def make(dtype, device):
        def points(n, seed):
            space = 2 * randn(n, D - 1, dtype=torch.float64, seed=seed)
            time = (1 / curvature + space.square().sum(-1, keepdim=True)).sqrt()
            return torch.cat([time, space], 1).to(device, dtype)

        return points(N, 0), points(M, 1)

    return make


SAMPLES = [
    Sample("plain", rows(5, 7, 4)),
    Sample("euclidean", rows(4, 9, 5), {"metric": "euclidean"}),
    Sample("cosine", rows(5, 7, 4), {"metric": "cosine"}),
    Sample("l1", rows(6, 11, 5), {"metric": "l1"}),
    Sample("poincare", rows(5, 8, 3, scale=0.2), {"metric": "poincare", "curvature": 0.5}),
    Sample("lorentz", on_hyperboloid(5, 6, 4, 2.0), {"metric": "lorentz", "curvature": 2.0}),
    Sample("one", rows(1, 1, 1)),
    Sample("products", rows(9, 70, 40)),
    Sample("prime", rows(37, 131, 67), {"metric": "euclidean"}),
    Sample("transposed", rows(6, 8, 5, view=lambda x, y: (x.T.contiguous().T, y))),
    Sample("sliced", rows(8, 12, 9, view=lambda x, y: (x[::2, 1::2], y[1::2, 1::2]))),
    Sample("expanded", rows(1, 6, 5, view=lambda x, y: (x.expand(4, 5), y))),
    Sample("no_rows", rows(0, 3, 4)),
    Sample("no_columns", rows(3, 0, 4)),
    Sample("no_features", rows(3, 5, 0)),
]


def bad(error, match, x=(5, 7), y=(6, 7), x_dtype=torch.float32, **options):
    make = lambda: (torch.ones(x, dtype=x_dtype), torch.ones(y))  # noqa: E731
    return BadInput(make, error, match, options)


def _workload(N, M, D, metric, quick=False):
    return Workload(
        f"{metric} N={N} M={M} D={D}",
        rows(N, M, D, scale=0.02 if metric == "poincare" else 1.0),
        flops=2.0 * N * M * D,
        backward_flops=6.0 * N * M * D,
        bytes=lambda size: size * ((N + M) * D + N * M),
        options={"metric": metric},
        quick=quick,
    )


DISTANCE = OpCases(
    name="pairwise_distance",
    plain=plain_pairwise_distance,
    samples=SAMPLES,
    workloads=[
        _workload(500, 1000, 64, "euclidean", quick=True),
        _workload(4096, 4096, 256, "euclidean"),
        _workload(4096, 4096, 32, "poincare"),
        _workload(4096, 4096, 16, "l1"),
    ],
    bad=[
        bad(ValueError, r"x must be \(N, D\)", x=(7,)),
        bad(ValueError, r"y must be \(M, D\)", y=(6, 8)),
        bad(TypeError, "y must have the dtype of x", x_dtype=torch.float64),
        bad(TypeError, "x must be float64", x_dtype=torch.int64),
        bad(ValueError, "metric must be one of", metric="dot"),
        bad(ValueError, "curvature must be", metric="poincare", curvature=0.0),
        bad(ValueError, "curvature must be", metric="lorentz", curvature=torch.ones(2)),
        bad(ValueError, "precision must be given", metric="mahalanobis"),
        bad(ValueError, "plan must be one of", plan="best"),
    ],
)

CASES = [DISTANCE]
