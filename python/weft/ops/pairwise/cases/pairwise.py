"""Cases of the algebra of pair functions and reductions."""

import torch
from torch.nn import functional as F

from weft.ops.cases import OpCases, Sample, Workload
from weft.ops.pairwise.cases.distance import bad, plain_pairwise_distance
from weft.ops.pairwise.cases.nearest import _mask as random_mask
from weft.ops.pairwise.cases.nearest import _rows as rows
from weft.ops.pairwise.masks import PairMask


def plain_values(x, y, pair, scale, gamma, eps, curvature, precision, bias):
    if pair in ("dot", "cosine"):
        if pair == "cosine":
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        s = scale * (x @ y.mT)
        return s if bias is None else s + bias
    if pair in ("rbf", "log"):
        d = plain_pairwise_distance(x, y)
        return (-gamma * d).exp() if pair == "rbf" else ((d + 1) / (d + eps)).log()
    return plain_pairwise_distance(x, y, pair, curvature=curvature, precision=precision)


def plain_pairwise(
    x,
    y,
    *,
    pair,
    reduce=None,
    over="y",
    mask=None,
    plan="auto",
    values=None,
    k=1,
    largest=True,
    scale=1.0,
    gamma=1.0,
    eps=1e-4,
    curvature=1.0,
    precision=None,
    bias=None,
):
    """All pairs, then the reduction."""
    s = plain_values(x, y, pair, scale, gamma, eps, curvature, precision, bias)
    if isinstance(mask, PairMask):
        mask = mask.block(0, *s.shape, s.device)
    if mask is None:
        mask = torch.ones_like(s, dtype=torch.bool)
    if reduce is None:
        return s.masked_fill(~mask, 0)

    def one(s, mask):
        if reduce == "sum":
            s = s.masked_fill(~mask, 0)
            return s.sum(1) if values is None else s @ values.to(s.dtype)
        if reduce == "mean":
            return s.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp_min(1)
        if reduce == "logsumexp":
            none = ~mask.any(1)
            s = s.masked_fill(~(mask | none[:, None]), -torch.inf)
            return s.logsumexp(1).masked_fill(none, -torch.inf)
        most = reduce == "max" or (reduce == "topk" and largest)
        fill = -torch.inf if most else torch.inf
        found, indices = s.masked_fill(~mask, fill).topk(k if reduce == "topk" else 1, largest=most)
        indices = indices.masked_fill(found == fill, -1)
        return (found, indices) if reduce == "topk" else (found[:, 0], indices[:, 0])

    both = {"y": [(s, mask)], "x": [(s.mT, mask.mT)], "both": [(s, mask), (s.mT, mask.mT)]}[over]
    results = [one(*directed) for directed in both]
    return results[0] if len(results) == 1 else tuple(results)


def _labels(N, M):
    return torch.arange(N) % 3, torch.arange(M) % 4


MASK = random_mask(6, 9)
FULL = MASK | torch.eye(6, 9, dtype=torch.bool) | (torch.arange(9) > 5)  # a pair in every row
SAME = PairMask.same(*_labels(6, 9))
DIFFERENT = PairMask.different(*_labels(6, 9)) & PairMask.distinct() & PairMask(MASK)


def _sample(name, make, pair, reduce, **options):
    return Sample(name, make, {"pair": pair, "reduce": reduce, **options})


def _sliced(x, y):
    return x[::2, 1::2], y[1::2, 1::2]


SAMPLES = [
    _sample("plain", rows(5, 7, 4), "rbf", "sum"),
    _sample("one", rows(1, 1, 1), "rbf", "sum"),
    _sample("products", rows(9, 70, 40), "rbf", "sum", gamma=0.02),
    _sample("no_rows", rows(0, 3, 4), "rbf", "sum"),
    _sample("no_columns", rows(3, 0, 4), "rbf", "sum"),
    _sample("no_features", rows(3, 5, 0), "rbf", "sum"),
    _sample("prime", rows(37, 131, 67), "rbf", "sum", gamma=0.01),
    _sample(
        "sliced", rows(8, 12, 9, view=lambda x, y: (x[::2, 1::2], y[1::2, 1::2])), "log", "sum"
    ),
    _sample("expanded", rows(1, 6, 5, view=lambda x, y: (x.expand(4, 5), y)), "rbf", "sum"),
    _sample("matrix", rows(6, 9, 4), "dot", None, scale=0.5, mask=SAME),
    _sample("over_x", rows(6, 9, 4), "dot", "sum", over="x", mask=MASK),
    _sample("mean", rows(6, 9, 4), "euclidean", "mean", over="both", mask=DIFFERENT),
    _sample("log", rows(6, 9, 4), "log", "mean"),
    _sample("l1", rows(6, 9, 4), "l1", "mean", over="x"),
    _sample("logsumexp", rows(6, 9, 4), "cosine", "logsumexp", scale=10.0),
    _sample("both", rows(6, 9, 40), "dot", "logsumexp", over="both", mask=FULL),
    _sample("poincare", rows(6, 9, 3, scale=0.2), "poincare", "logsumexp"),
    _sample("no_columns_exp", rows(3, 0, 4), "dot", "logsumexp"),
    _sample("same", rows(6, 9, 4), "dot", "logsumexp", mask=SAME),
    _sample("min", rows(6, 9, 4), "sqeuclidean", "min", mask=DIFFERENT),
    _sample("max", rows(6, 9, 4), "dot", "max", over="x", mask=FULL),
    _sample("topk", rows(6, 9, 4), "rbf", "topk", k=3),
]


def _kernel_sum(N, D, quick=False):
    return Workload(
        f"gaussian N=M={N} D={D}",
        rows(N, N, D),
        flops=2.0 * N * N * D,
        backward_flops=6.0 * N * N * D,
        bytes=lambda size: size * (2 * N * D + N),
        options={"pair": "rbf", "reduce": "sum", "gamma": 0.5 / D},
        quick=quick,
    )


PAIRWISE = OpCases(
    name="pairwise",
    plain=plain_pairwise,
    samples=SAMPLES,
    workloads=[_kernel_sum(1000, 16, quick=True), _kernel_sum(20_000, 3), _kernel_sum(20_000, 64)],
    bad=[
        bad(ValueError, r"x must be \(N, D\)", x=(7,), pair="dot"),
        bad(ValueError, r"y must be \(M, D\)", y=(6, 8), pair="dot"),
        bad(TypeError, "y must have the dtype of x", x_dtype=torch.float64, pair="dot"),
        bad(ValueError, "pair must be one of", pair="nearby"),
        bad(ValueError, "reduce must be None or one of", pair="dot", reduce="product"),
        bad(ValueError, "over must be y, x or both", pair="dot", reduce="sum", over="all"),
        bad(ValueError, "goes with a reduction", pair="dot", over="x"),
        bad(ValueError, "plan must be one of", pair="dot", reduce="sum", plan="best"),
        bad(ValueError, "plan: chunked", pair="dot", reduce="sum", plan="chunked"),
        bad(ValueError, "plan: l1", pair="l1", reduce="sum", plan="fused"),
        bad(ValueError, "plan: min", pair="dot", reduce="min", plan="fused"),
        bad(ValueError, "values go with", pair="dot", reduce="mean", values=torch.ones(6)),
        bad(ValueError, r"values must be \(6, E\)", pair="dot", reduce="sum", values=torch.ones(5)),
        bad(ValueError, "k must be >= 1", pair="dot", reduce="topk", k=0),
        bad(TypeError, "k must be an integer", pair="dot", reduce="topk", k=1.0),
        bad(TypeError, "mask must be a bool tensor", pair="dot", reduce="sum", mask=3),
        bad(TypeError, "mask must be a bool", pair="dot", reduce="sum", mask=torch.ones(5, 6)),
        bad(
            ValueError,
            "curvature must be a number for logsumexp",
            pair="poincare",
            reduce="logsumexp",
            curvature=torch.ones(()),
        ),
        bad(ValueError, "gamma must be", pair="rbf", reduce="sum", gamma=0.0),
    ],
)

CASES = [PAIRWISE]
