"""Cases of the statistics of classes."""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def plain_segment_stats(
    x, labels, num_classes, *, covariance=False, previous=None, weights=None, group=None
):
    """Sums by ``index_add``, in two passes: means, then squared deviations."""
    C, D = num_classes, x.shape[1]
    w = None if weights is None else weights.to(x.dtype)
    if w is not None:
        x = x.masked_fill((w == 0)[:, None], 0)
    ones = torch.ones_like(labels) if w is None else w
    count = ones.new_zeros(C).index_add(0, labels, ones)
    n = torch.where(count > 0, count, 1)[:, None]
    mean = x.new_zeros(C, D).index_add(0, labels, x if w is None else x * w[:, None]) / n
    r = x - mean[labels]
    square = r.square() if w is None else r.square() * w[:, None]
    m2 = x.new_zeros(C, D).index_add(0, labels, square)
    scatter = None
    if covariance == "shared":
        scatter = (r if w is None else r * w[:, None]).mT @ r
    elif covariance:
        products = r[:, :, None] * (r if w is None else r * w[:, None])[:, None]
        scatter = x.new_zeros(C, D, D).index_add(0, labels, products)
    return (count, mean, m2) if scatter is None else (count, mean, m2, scatter)


def _rows(N, D, C, *, offset=0.0, view=None, one=False):
    def make(dtype, device):
        x = (offset + randn(N, D, dtype=torch.float64)).to(device, dtype)
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(0, max(C, 1), (N,), generator=generator).to(device)
        if one:
            labels = torch.full_like(labels, C - 1)
        return view(x, labels) if view else (x, labels)

    return make


def _sample(name, N, D, C, *, offset=0.0, view=None, one=False, **options):
    make = _rows(N, D, C, offset=offset, view=view, one=one)
    # Sums of weights depend on no argument that has a gradient here.
    constant = (0,) if "weights" in options else ()
    return Sample(name, make, {"num_classes": C, **options}, constant)


WEIGHTS = 0.25 + torch.arange(13, dtype=torch.float64) / 8
SOME = torch.tensor([1.0, 0, 2, 0.5, 0, 0, 3, 1, 0, 1, 0.25, 0, 4])


def _unused_are_nan(x, labels):
    return x.masked_fill((SOME.to(x.device) == 0)[:, None], torch.nan), labels


SAMPLES = [
    _sample("plain", 13, 5, 3),
    _sample("one_row", 1, 1, 1),
    _sample("empty_classes", 5, 4, 11),
    _sample("prime", 197, 37, 5),
    _sample("offset", 67, 5, 3, offset=1000.0),
    _sample("blocks", 2503, 3, 2, offset=10.0),
    _sample("one_class", 71, 131, 4, one=True),
    _sample("columns", 13, 6, 3, view=lambda x, labels: (x.T.contiguous().T, labels)),
    _sample("sliced", 26, 12, 3, view=lambda x, labels: (x[::2, 1::2], labels[::2])),
    _sample("expanded", 13, 1, 3, view=lambda x, labels: (x.expand(13, 7), labels)),
    _sample("weights", 13, 5, 3, weights=WEIGHTS),
    _sample("weights_of_zero", 13, 5, 3, view=_unused_are_nan, weights=SOME),
    _sample("shared_covariance", 13, 5, 3, covariance="shared"),
    _sample("class_covariance", 13, 5, 3, covariance="class"),
    _sample("no_rows", 0, 5, 3),
    _sample("no_columns", 7, 0, 3),
]


def _bad(error, match, x=(4, 3), labels=(0, 1, 0, 1), dtype=torch.float32, C=2, **options):
    labels = labels if isinstance(labels, torch.Tensor) else torch.tensor(labels)
    return BadInput(lambda: (torch.ones(x, dtype=dtype), labels, C), error, match, options)


def _classes(N, D, C, quick=False):
    return Workload(
        f"{N:,} x {D} into {C}",
        _rows(N, D, C),
        flops=5.0 * N * D,
        backward_flops=5.0 * N * D,
        bytes=lambda size: size * N * D + 8 * N + 8 * C * D,
        options={"num_classes": C},
        quick=quick,
    )


SEGMENT_STATS = OpCases(
    name="segment_stats",
    plain=plain_segment_stats,
    samples=SAMPLES,
    workloads=[
        _classes(50_000, 128, 100, quick=True),
        _classes(1_000_000, 128, 1000),
        _classes(100_000, 512, 10),
    ],
    bad=[
        _bad(ValueError, r"x must be \(N, D\)", x=(4,)),
        _bad(TypeError, "x must be float64", dtype=torch.int64),
        _bad(TypeError, "labels must be an int64", labels=torch.zeros(4)),
        _bad(ValueError, r"labels must be \(4,\)", labels=(0, 1)),
        _bad(ValueError, r"labels must be in \[0, 2\), got 0 to 2", labels=(0, 1, 2, 0)),
        _bad(ValueError, r"labels must be in \[0, 2\), got -1", labels=(0, 1, -1, 0)),
        _bad(ValueError, "num_classes must be >= 0", C=-1),
        _bad(ValueError, "covariance must be one of", covariance="full"),
        _bad(TypeError, "previous must be SegmentStats", previous=torch.ones(2)),
        _bad(TypeError, "weights must be a float", weights=torch.ones(4, dtype=torch.int64)),
        _bad(ValueError, r"weights must be \(4,\)", weights=torch.ones(3)),
        _bad(ValueError, "weights must be >= 0, got -1", weights=torch.tensor([1.0, 2, -1, 0])),
    ],
)

CASES = [SEGMENT_STATS]
