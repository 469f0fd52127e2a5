"""Cases of the nearest neighbours."""

import torch
from torch.nn import functional as F

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def plain_nearest(
    x,
    y,
    k=1,
    metric="sqeuclidean",
    mask=None,
    largest=None,
    *,
    scale=1.0,
    gamma=1.0,
    eps=1e-4,
    curvature=1.0,
    precision=None,
    bias=None,
):
    """All pairs, then topk; distances from the expanded square, as is usual, for large M."""
    if metric == "cosine":
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    if metric in ("dot", "cosine"):
        s = scale * (x @ y.mT)
        s = s if bias is None else s + bias
    elif metric == "l1":
        s = (x[:, None] - y[None]).abs().sum(-1)
    else:
        s = (x.square().sum(-1)[:, None] + y.square().sum(-1) - 2 * x @ y.mT).clamp_min(0)
        if metric == "poincare":
            room = (1 - curvature * x.square().sum(-1))[:, None] * (
                1 - curvature * y.square().sum(-1)
            )
            s = torch.acosh(1 + 2 * curvature * s / room) / curvature**0.5
        if metric == "euclidean":
            s = s.sqrt()
        if metric == "rbf":
            s = (-gamma * s).exp()
        if metric == "log":
            s = ((s + 1) / (s + eps)).log()
    if largest is None:
        largest = metric in ("dot", "cosine", "rbf", "log")
    fill = -torch.inf if largest else torch.inf
    if mask is not None:
        s = s.masked_fill(~mask, fill)
    s = F.pad(s, (0, max(0, k - s.shape[1])), value=fill)
    values, indices = s.topk(k, largest=largest)
    return values, indices.masked_fill(values == fill, -1)


def _rows(N, M, D, view=None, scale=1.0):
    def make(dtype, device):
        x = (scale * randn(N, D, dtype=torch.float64)).to(device, dtype)
        y = (scale * randn(M, D, dtype=torch.float64, seed=1)).to(device, dtype)
        return view(x, y) if view else (x, y)

    return make


def _mask(N, M, seed=2):
    mask = randn(N, M, seed=seed) > 0
    mask[1] = False
    mask[2] = False
    mask[2, M // 2] = True
    return mask


SAMPLES = [
    Sample("plain", _rows(5, 7, 4)),
    Sample("three", _rows(5, 7, 4), {"k": 3}),
    Sample("euclidean", _rows(4, 9, 5), {"k": 2, "metric": "euclidean"}),
    Sample("dot", _rows(5, 7, 4), {"k": 3, "metric": "dot", "scale": 0.5}),
    Sample("cosine", _rows(5, 7, 4), {"k": 3, "metric": "cosine"}),
    Sample("l1", _rows(6, 11, 5), {"k": 3, "metric": "l1"}),
    Sample("rbf", _rows(5, 8, 3), {"k": 2, "metric": "rbf", "gamma": 0.25}),
    Sample("log", _rows(5, 8, 3), {"k": 2, "metric": "log"}),
    Sample("poincare", _rows(5, 8, 3, scale=0.2), {"k": 3, "metric": "poincare"}),
    Sample("farthest", _rows(5, 7, 4), {"k": 2, "largest": True}),
    Sample("least_similar", _rows(5, 7, 4), {"metric": "dot", "largest": False}),
    Sample("mask", _rows(6, 9, 4), {"k": 3, "mask": _mask(6, 9)}),
    Sample("mask_view", _rows(6, 9, 4), {"k": 3, "mask": _mask(9, 6).T}),
    Sample("more_than_there_are", _rows(3, 4, 2), {"k": 6}),
    Sample("one", _rows(1, 1, 1)),
    Sample("prime", _rows(37, 131, 67), {"k": 5}),
    Sample("transposed", _rows(6, 8, 5, view=lambda x, y: (x.T.contiguous().T, y)), {"k": 2}),
    Sample("sliced", _rows(8, 12, 9, view=lambda x, y: (x[::2, 1::2], y[1::2, 1::2])), {"k": 2}),
    Sample("expanded", _rows(1, 6, 5, view=lambda x, y: (x.expand(4, 5), y)), {"k": 2}),
    Sample("no_queries", _rows(0, 3, 4), {"k": 2}),
    Sample("no_rows", _rows(3, 0, 4), {"k": 2}),
    Sample("no_features", _rows(3, 5, 0), {"k": 2}),
]


def _bad(error, match, x=(5, 7), y=(6, 7), x_dtype=torch.float32, **options):
    make = lambda: (torch.ones(x, dtype=x_dtype), torch.ones(y))  # noqa: E731
    return BadInput(make, error, match, options)


def _search(name, N, M, D, k, quick=False):
    return Workload(
        f"{name} N={N} M={M} D={D} k={k}",
        _rows(N, M, D),
        flops=2.0 * N * M * D,
        backward_flops=4.0 * N * k * D,
        bytes=lambda size: size * (N + M) * D + (size + 8) * N * k,
        options={"k": k},
        quick=quick,
    )


NEAREST = OpCases(
    name="nearest",
    plain=plain_nearest,
    samples=SAMPLES,
    workloads=[
        _search("search", 500, 5000, 64, 10, quick=True),
        _search("search", 1000, 100_000, 128, 10),
        _search("codebook", 16384, 8192, 8, 1),
        _search("codebook", 16384, 8192, 64, 1),
        _search("codebook", 16384, 1024, 256, 1),
    ],
    bad=[
        _bad(ValueError, r"x must be \(N, D\)", x=(7,)),
        _bad(ValueError, r"y must be \(M, D\)", y=(6, 8)),
        _bad(TypeError, "y must have the dtype of x", x_dtype=torch.float64),
        _bad(TypeError, "x must be float64", x_dtype=torch.int64),
        _bad(ValueError, "pair must be one of", metric="nearby"),
        _bad(ValueError, "k must be >= 1", k=0),
        _bad(TypeError, "k must be an integer", k=2.0),
        _bad(TypeError, "mask must be a bool", mask=torch.ones(5, 6)),
        _bad(ValueError, r"mask must be \(5, 6\)", mask=torch.ones(6, 5, dtype=torch.bool)),
        _bad(ValueError, "gamma must be", metric="rbf", gamma=0.0),
        _bad(ValueError, "bias goes with dot", bias=torch.ones(6)),
        _bad(ValueError, "precision must be given", metric="mahalanobis"),
    ],
)

CASES = [NEAREST]
