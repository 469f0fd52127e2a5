"""Cases of doubly stochastic matrices."""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def plain_doubly_stochastic(
    scores, iterations, *, epsilon=1.0, last="rows", stabilizer=0.0, group=None
):
    """The published loops: exponentials and divisions, a whole matrix each."""
    first, second = (-2, -1) if last == "rows" else (-1, -2)
    N, M = scores.shape[-2:]
    size = N / M if last == "rows" else M / N if N else 1.0
    if stabilizer:
        q = size * (scores / epsilon).softmax(first) + stabilizer
        q = q / (q.sum(second, keepdim=True) + stabilizer)
        for _ in range(iterations - 1):
            q = size * q / (q.sum(first, keepdim=True) + stabilizer)
            q = q / (q.sum(second, keepdim=True) + stabilizer)
        return q
    q = (scores / epsilon).exp()
    for _ in range(iterations):
        q = size * q / q.sum(first, keepdim=True)
        q = q / q.sum(second, keepdim=True)
    return q


def _scores(*shape, view=lambda t: t):
    return lambda dtype, device: (view(randn(*shape, dtype=dtype, device=device)),)


SWAV = {"iterations": 3, "epsilon": 0.3}
MHC = {"iterations": 5, "last": "columns", "stabilizer": 1e-6}

SAMPLES = [
    Sample("assignments", _scores(37, 19), SWAV),
    Sample("prototypes_last", _scores(2, 17, 70), {**SWAV, "last": "columns"}),
    Sample("connections", _scores(19, 4, 4), MHC),
    Sample("tiny", _scores(5, 3, 7), SWAV),
    Sample("stabilized_rows", _scores(2, 3, 2, 5), {**MHC, "last": "rows", "stabilizer": 0.01}),
    Sample("strided", _scores(24, 22, view=lambda t: t.T[::2, 1::2]), SWAV),
    Sample("broadcast", _scores(1, 5, 12, view=lambda t: t.expand(3, 5, 12)), SWAV),
    Sample("empty", _scores(2, 0, 5), SWAV),
]


def _bad(error, match, shape=(3, 4), dtype=torch.float32, **options):
    options = {"iterations": 3, **options}
    return BadInput(lambda: (torch.ones(shape, dtype=dtype),), error, match, options)


def _workload(name, shape, quick=False, **options):
    """An exponential of each entry, then a multiplication and an addition per entry and sum."""
    entries = float(torch.Size(shape).numel())
    passes = 2 * options["iterations"]
    return Workload(
        name,
        _scores(*shape, view=lambda t: t.clamp(-1, 1)),
        flops=entries * (10 + 2 * passes),
        backward_flops=entries * (10 + 6 * passes),
        bytes=lambda size: 2.0 * size * entries,
        options=options,
        quick=quick,
    )


CONNECTIONS = {"iterations": 20, "last": "columns", "stabilizer": 1e-6}

DOUBLY_STOCHASTIC = OpCases(
    name="doubly_stochastic",
    plain=plain_doubly_stochastic,
    samples=SAMPLES,
    workloads=[
        _workload("SwAV 384x300 T=3", (384, 300), True, iterations=3, epsilon=0.05),
        _workload("SwAV 3840x3000 T=3", (3840, 3000), iterations=3, epsilon=0.05),
        _workload("mHC 16384x4x4 T=20", (16384, 4, 4), True, **CONNECTIONS),
        _workload("mHC 1048576x4x4 T=20", (1 << 20, 4, 4), **CONNECTIONS),
        _workload("64x256x256 T=10", (64, 256, 256), iterations=10, epsilon=0.05),
    ],
    bad=[
        _bad(ValueError, r"scores must be \(\.\.\., N, M\)", shape=(3,)),
        _bad(ValueError, "iterations must be an integer >= 1, got 0", iterations=0),
        _bad(ValueError, "iterations must be an integer", iterations=2.0),
        _bad(ValueError, "epsilon must be > 0", epsilon=0.0),
        _bad(ValueError, "epsilon must be > 0", epsilon=float("nan")),
        _bad(ValueError, "last must be 'rows' or 'columns'", last="both"),
        _bad(ValueError, "stabilizer must be 0 or", stabilizer=-1.0),
        _bad(ValueError, "group goes with last='rows'", last="columns", group=object()),
        _bad(TypeError, "scores must be float64", dtype=torch.int64),
    ],
)

CASES = [DOUBLY_STOCHASTIC]
