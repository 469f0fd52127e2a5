"""Cases of conditional transport."""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def plain_conditional_transport(
    x,
    y,
    a=None,
    b=None,
    *,
    x_lengths=None,
    y_lengths=None,
    rho=0.5,
    temperature=1.0,
    metric="cosine",
    return_plans=False,
):
    """Two softmaxes of the matrix of costs."""
    if metric == "cosine":
        x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
        cost = 1 - x @ y.mT
    else:
        cost = (x[:, :, None] - (y if y.dim() == 2 else y[:, None])).square().sum(-1)
    B, N, M = cost.shape
    shares, means = [], []
    for n, weights, lengths in ((N, a, x_lengths), (M, b, y_lengths)):
        w = cost.new_ones(B, n) if weights is None else weights.to(cost.dtype).expand(B, n)
        if lengths is not None:
            w = torch.where(torch.arange(n, device=w.device) < lengths[:, None], w, 0)
        shares.append(w / w.sum(1, keepdim=True).clamp(min=1e-30))
    wa, wb = shares
    for dim, w in ((2, wb[:, None]), (1, wa[:, :, None])):
        logits = torch.where(w > 0, torch.where(w > 0, w, 1).log() - cost / temperature, -torch.inf)
        means.append((torch.softmax(logits, dim).nan_to_num() * cost).sum(dim))
    value = rho * (wa * means[0]).sum(1) + (1 - rho) * (wb * means[1]).sum(1)
    return torch.where((wa > 0).any(1) & (wb > 0).any(1), value, 0)


def _points(B, N, M, D, *, shared=False, weights=False, seed=0, spread=1.0):
    def make(dtype, device):
        x = spread * randn(B, N, D, dtype=dtype, device=device, seed=seed)
        y = randn(*([] if shared else [B]), M, D, dtype=dtype, device=device, seed=seed + 1)
        if not weights:
            return x, y
        a, b = (randn(B, n, dtype=dtype, device=device, seed=seed + 2).abs() + 0.25 for n in (N, M))
        return x, y, a, b

    return make


def _sliced(dtype, device):
    x = randn(3, 12, 8, dtype=dtype, device=device)
    return x[:, ::2, ::2], x[:1, 1::3, 1::2].expand(3, 4, 4)


SOFT = {"temperature": 0.2, "rho": 0.3}
RAGGED = {
    "temperature": 0.5,
    "b": torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.5]]),
    "x_lengths": torch.tensor([5, 4, 2]),
}

SAMPLES = [
    Sample("plain", _points(2, 5, 4, 6)),
    Sample("several_blocks", _points(1, 131, 37, 5)),
    Sample("no_points", _points(2, 0, 3, 4)),
    Sample("weights", _points(2, 5, 3, 4, shared=True, weights=True), SOFT),
    Sample("ragged", _points(3, 5, 3, 4), RAGGED),
    Sample("sliced", _sliced, SOFT),
    Sample("squares", _points(2, 4, 3, 2), {"metric": "sqeuclidean", "temperature": 2.0}),
]


def _workload(name, B, N, M, D, quick=False):
    """One product and two exponentials of each pair; reads the points."""
    return Workload(
        name,
        _points(B, N, M, D, shared=True),
        flops=2.0 * B * N * M * D,
        backward_flops=4.0 * B * N * M * D,
        bytes=lambda size: size * (B * N * D + M * D + B),
        options={"temperature": 0.1},
        quick=quick,
    )


def _bad(error, match, x=(2, 5, 4), y=(2, 3, 4), **options):
    make = lambda: (torch.ones(x), torch.ones(y))  # noqa: E731
    return BadInput(make, error, match, options)


CONDITIONAL_TRANSPORT = OpCases(
    name="conditional_transport",
    plain=plain_conditional_transport,
    samples=SAMPLES,
    workloads=[
        _workload("B=64 N=196 M=80 D=512", 64, 196, 80, 512, quick=True),
        _workload("B=64 N=196 M=500 D=512", 64, 196, 500, 512),
    ],
    bad=[
        _bad(ValueError, r"x must be \(B, N, D\)", x=(5, 4)),
        _bad(ValueError, r"y must be \(2, M, 4\) or \(M, 4\)", y=(3, 3, 4)),
        _bad(ValueError, r"rho must be in \[0, 1\]", rho=1.5),
        _bad(ValueError, "temperature must be > 0", temperature=0.0),
        _bad(ValueError, "temperature must have one element", temperature=torch.ones(2)),
        _bad(ValueError, "metric must be one of", metric="dot"),
        _bad(ValueError, r"b must be \(2, 3\) or \(3,\)", b=torch.ones(5)),
        _bad(ValueError, "a must be >= 0", a=-torch.ones(5)),
        _bad(TypeError, "a must be a float tensor", a=torch.ones(5, dtype=torch.int64)),
        _bad(TypeError, "x_lengths must be an int64 tensor", x_lengths=torch.ones(2)),
        _bad(ValueError, r"y_lengths must be in \[0, 3\]", y_lengths=torch.tensor([1, 4])),
    ],
)

CASES = [CONDITIONAL_TRANSPORT]
