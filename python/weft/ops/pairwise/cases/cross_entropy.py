"""Cases of the linear cross entropy and of the contrastive losses."""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn

CHUNK_ROWS = 1024  # of the plain formulas: a chunk of logits at a time, computed again backwards


def _labels(N, C, device="cpu", seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(max(C, 1), (N,), generator=generator).to(device)


# ---- linear_cross_entropy -----------------------------------------------------------------------


def plain_linear_cross_entropy(
    x,
    weight,
    target,
    bias=None,
    *,
    softcap=None,
    margin=None,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
    group=None,
):
    """All logits at once, as PyTorch users write it."""
    logits = F.linear(x, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if margin:
        valid = target.masked_fill(target == ignore_index, -1)
        classes = torch.arange(logits.shape[1], device=x.device)
        logits = logits - margin * (valid[:, None] == classes)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return F.cross_entropy(logits, target, reduction=reduction, **options)


def _linear(N, C, D, *, bias=False, ignored=False, view=None, scale=1.0):
    def make(dtype, device):
        x = scale * randn(N, D, dtype=dtype, device=device)
        weight, target = randn(C, D, dtype=dtype, device=device, seed=1), _labels(N, C, device)
        if ignored:
            target[::3] = -100
        if view:
            x, weight = view(x, weight)
        of_bias = (randn(C, dtype=dtype, device=device, seed=2),) if bias else ()
        return (x, weight, target, *of_bias)

    return make


def _sliced(x, weight):
    return x[:, ::2], weight.T.contiguous().T[:, 1::2]


LINEAR_SAMPLES = [
    Sample("plain", _linear(5, 4, 7)),
    Sample("bias", _linear(5, 4, 7, bias=True)),
    Sample("ignored", _linear(7, 5, 6, bias=True, ignored=True)),
    Sample(
        "everything",
        _linear(7, 5, 6, bias=True, ignored=True),
        {"softcap": 3.0, "margin": 0.4, "label_smoothing": 0.2},
    ),
    Sample("each", _linear(7, 5, 6, ignored=True), {"reduction": "none", "label_smoothing": 0.1}),
    Sample("sum", _linear(4, 6, 5, bias=True), {"reduction": "sum", "softcap": 1.5}),
    Sample("one", _linear(1, 1, 1)),
    Sample("prime", _linear(67, 131, 37, bias=True)),
    Sample("no_samples", _linear(0, 3, 5), {"reduction": "sum"}),
    Sample("no_features", _linear(13, 9, 0, bias=True)),
    Sample("strided", _linear(6, 5, 8, view=_sliced)),
    Sample("expanded", _linear(5, 4, 6, view=lambda x, w: (x[:1].expand(5, 6), w))),
]


def _bad_linear(error, match, x=(4, 5), weight=(3, 5), target=None, bias=None, **options):
    labels = torch.tensor([0, 1, 2, 1]) if target is None else target
    make = lambda: (torch.ones(x), torch.ones(weight), labels, bias)  # noqa: E731
    return BadInput(make, error, match, options)


def _head(N, C, D, quick=False):
    product = 2.0 * N * C * D
    return Workload(
        f"N={N} C={C} D={D}",
        _linear(N, C, D, scale=D**-0.5),
        flops=product,
        backward_flops=2 * product,
        bytes=lambda size: size * (N + C) * D,
        quick=quick,
    )


LINEAR_CROSS_ENTROPY = OpCases(
    name="linear_cross_entropy",
    plain=plain_linear_cross_entropy,
    samples=LINEAR_SAMPLES,
    workloads=[_head(192, 1111, 96, quick=True), _head(1024, 32000, 1024)],
    bad=[
        _bad_linear(ValueError, r"x must be \(N, D\)", x=(5,)),
        _bad_linear(ValueError, r"weight must be \(C, D\) with D = 5", weight=(3, 6)),
        _bad_linear(ValueError, r"bias must be \(3,\)", bias=torch.ones(4)),
        _bad_linear(TypeError, "bias must have the dtype", bias=torch.ones(3).double()),
        _bad_linear(TypeError, "target must be an int64", target=torch.ones(4)),
        _bad_linear(ValueError, r"target must be \(4,\)", target=torch.tensor([0])),
        _bad_linear(ValueError, r"target must be in \[0, 3\)", target=torch.tensor([0, 1, 3, 1])),
        _bad_linear(ValueError, r"target must be in .* got -1", target=torch.tensor([0, 1, -1, 1])),
        _bad_linear(ValueError, "softcap must be", softcap=0.0),
        _bad_linear(ValueError, "margin must be", margin=float("nan")),
        _bad_linear(ValueError, "label_smoothing must be", label_smoothing=1.5),
        _bad_linear(ValueError, "reduction must be", reduction="average"),
    ],
)


# ---- contrastive_loss ---------------------------------------------------------------------------


def _one_side(x, y, target, count, temperature, mask, bias, sigmoid):
    """Losses of some rows: target (rows, M) bool, count of the positives of each."""
    s = x @ y.mT / temperature
    if bias is not None:
        s = s + bias
    allowed = None if mask is None else mask | target
    if sigmoid:
        losses = -F.logsigmoid(torch.where(target, s, -s))
        return (losses if allowed is None else losses.masked_fill(~allowed, 0)).sum(1)
    masked = s if allowed is None else s.masked_fill(~allowed, -torch.inf)
    log_p = masked.log_softmax(1)
    losses = -log_p.masked_fill(~target, 0).sum(1) / count.clamp(min=1)
    return losses.masked_fill(count == 0, 0)


def plain_contrastive_loss(
    x,
    y=None,
    *,
    kind="infonce",
    labels=None,
    temperature,
    symmetric=False,
    weights=None,
    mask=None,
    positives=None,
    bias=None,
    reduction="mean",
    group=None,
):
    """Row chunks with checkpointing, the memory of PyTorch users who run out of it."""
    own = y is None
    y = x if own else y
    N, M = x.shape[0], y.shape[0]
    rows, columns = torch.arange(N, device=x.device), torch.arange(M, device=x.device)
    if labels is not None:
        of_x, of_y = labels if isinstance(labels, tuple) else (labels, labels)
    elif own and positives is None:
        of_x, of_y = (rows + N // 2) % max(N, 1), columns
    else:
        of_x, of_y = rows, columns
    total = []
    for side in range(1 + symmetric):
        a, b, la, lb = (x, y, of_x, of_y) if side == 0 else (y, x, of_y, of_x)
        losses, counts = [], []
        for start in range(0, a.shape[0], CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            target = la[part, None] == lb
            if positives is not None:
                target = (positives if side == 0 else positives.mT)[part]
            allowed = None if mask is None else (mask if side == 0 else mask.mT)[part]
            if own:
                other = rows[part, None] != columns
                target = target & other
                allowed = other if allowed is None else allowed & other
            counts.append(target.sum(1))
            args = (a[part], b, target, counts[-1], temperature, allowed, bias, kind == "sigmoid")
            losses.append(checkpoint(_one_side, *args, use_reentrant=False))
        losses = torch.cat(losses) if losses else (a.sum() + b.sum()).expand(0)
        count = torch.cat(counts) if counts else a.new_zeros(0)
        losses = losses if weights is None else weights * losses
        used = N if kind == "sigmoid" else (count > 0).sum()
        if reduction == "mean":
            losses = losses.sum() / max(int(used), 1)
        total.append(losses if reduction != "sum" else losses.sum())
    return sum(total) / len(total)


def _pairs(N, M, D, *, own=False, view=None):
    def make(dtype, device):
        x = D**-0.5 * randn(N, D, dtype=dtype, device=device)  # logits near 1: a loss that is none
        y = randn(M, D, dtype=dtype, device=device, seed=1)  # of cancellation
        if view:
            x, y = view(x, y)
        return (x,) if own else (x, y)

    return make


def _bools(N, M, share, seed=5):
    return torch.rand(N, M, generator=torch.Generator().manual_seed(seed)) < share


WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.3, 1.5])
LABELS = torch.tensor([0, 1, 0, 3, 1, 0])  # label 3 has no second sample
CLIP = {"temperature": 0.5, "symmetric": True}
CONTRASTIVE_SAMPLES = [
    Sample("infonce", _pairs(5, 5, 7), {"temperature": 0.5}),
    Sample("queue", _pairs(4, 9, 6), {"temperature": 0.7}),
    Sample("two_views", _pairs(6, 6, 5, own=True), {"temperature": 0.8}),
    Sample("clip", _pairs(6, 6, 5), CLIP),
    Sample("clip_prime", _pairs(131, 131, 37), CLIP | {"temperature": 5.0}),
    Sample(
        "clip_weighted", _pairs(6, 6, 5), CLIP | {"weights": WEIGHTS, "mask": _bools(6, 6, 0.6)}
    ),
    Sample("each", _pairs(6, 6, 5), CLIP | {"reduction": "none", "weights": WEIGHTS}),
    Sample(
        "supcon", _pairs(6, 6, 5, own=True), {"kind": "supcon", "labels": LABELS, "temperature": 1}
    ),
    Sample(
        "supcon_two",
        _pairs(23, 17, 5),
        {
            "kind": "supcon",
            "labels": (_labels(23, 9), _labels(17, 9, seed=4)),
            "temperature": 1.0,
            "symmetric": True,
            "mask": _bools(23, 17, 0.5),
        },
    ),
    Sample(
        "positives",
        _pairs(6, 6, 5, own=True),
        {
            "kind": "supcon",
            "positives": _bools(6, 6, 0.4),
            "mask": _bools(6, 6, 0.5, 6),
            "temperature": 1.0,
        },
    ),
    Sample("siglip", _pairs(6, 6, 5), {"kind": "sigmoid", "temperature": 0.5, "bias": -1.0}),
    Sample(
        "siglip_masked",
        _pairs(6, 7, 5),
        {"kind": "sigmoid", "temperature": 0.5, "mask": _bools(6, 7, 0.5).T.contiguous().T},
    ),
    Sample("sum", _pairs(5, 5, 7), {"temperature": 0.5, "reduction": "sum"}),
    Sample("one", _pairs(1, 1, 1), {"temperature": 1.0}),
    Sample("prime", _pairs(67, 131, 37), {"temperature": 5.0}),
    Sample("empty", _pairs(0, 3, 5), {"temperature": 1.0}),
    Sample(
        "strided",
        _pairs(6, 6, 8, view=lambda x, y: (x[:, ::2], y.T.contiguous().T[:, 1::2])),
        {"temperature": 0.5},
    ),
    Sample(
        "expanded",
        _pairs(3, 4, 6, view=lambda x, y: (x[:1].expand(3, 6), y)),
        {"temperature": 0.5},
    ),
]


def _bad(error, match, x=(4, 5), y=(4, 5), **options):
    make = lambda: (torch.ones(x), None if y is None else torch.ones(y))  # noqa: E731
    return BadInput(make, error, match, {"temperature": 1.0} | options)


LONGS = torch.tensor([0, 1, 0, 1])


def _batch(N, D, quick=False, **options):
    product = 2.0 * N * N * D

    def make(dtype, device):
        rows = (randn(N, D, dtype=torch.float32, seed=s) for s in (0, 1))
        return tuple(F.normalize(t, dim=1).to(device, dtype) for t in rows)

    both = " two-sided" if options.get("symmetric") else ""
    return Workload(
        f"N={N} D={D}{both}",
        make,
        flops=product,
        backward_flops=2 * product,
        bytes=lambda size: size * 2 * N * D,
        options={"temperature": 0.07} | options,
        quick=quick,
    )


CONTRASTIVE_LOSS = OpCases(
    name="contrastive_loss",
    plain=plain_contrastive_loss,
    samples=CONTRASTIVE_SAMPLES,
    workloads=[
        _batch(1031, 128, symmetric=True),
        _batch(1031, 128, quick=True),
        _batch(8192, 512),
        _batch(8192, 512, symmetric=True),
    ],
    bad=[
        _bad(ValueError, r"x must be \(N, D\)", x=(5,)),
        _bad(ValueError, r"y must be \(M, D\) with D = 5", y=(4, 6)),
        _bad(ValueError, "at least as many rows as x", y=(3, 5)),
        _bad(ValueError, "as many rows as x", y=(5, 5), symmetric=True),
        _bad(ValueError, "two views", x=(5, 5), y=None),
        _bad(ValueError, "y must be given for symmetric", y=None, symmetric=True),
        _bad(ValueError, "y must be given for sigmoid", y=None, kind="sigmoid"),
        _bad(ValueError, "symmetric: the sigmoid loss", kind="sigmoid", symmetric=True),
        _bad(ValueError, "kind must be", kind="triplet"),
        _bad(ValueError, "labels or positives must be given", kind="supcon"),
        _bad(ValueError, "exclude each other", kind="supcon", labels=LONGS, positives=LONGS),
        _bad(ValueError, "not with infonce", labels=LONGS),
        _bad(TypeError, "labels must be an int64", kind="supcon", labels=LONGS.float()),
        _bad(ValueError, r"labels must be \(4,\)", kind="supcon", labels=LONGS[:3]),
        _bad(ValueError, r"labels of y must be \(6,\)", y=(6, 5), kind="supcon", labels=LONGS),
        _bad(TypeError, "positives must be a bool", kind="supcon", positives=LONGS),
        _bad(TypeError, "mask must be a bool", mask=torch.ones(4, 4)),
        _bad(ValueError, r"mask must be \(4, 4\)", mask=torch.ones(4, 3, dtype=torch.bool)),
        _bad(ValueError, "temperature must be finite and > 0", temperature=0.0),
        _bad(ValueError, "temperature must be finite", temperature=torch.tensor(-1.0)),
        _bad(ValueError, "temperature must be a number or 0-d", temperature=torch.ones(2)),
        _bad(TypeError, "temperature must be floating", temperature=torch.tensor(1)),
        _bad(ValueError, "bias goes with sigmoid", bias=1.0),
        _bad(TypeError, "weights must be a floating", weights=LONGS),
        _bad(ValueError, r"weights must be \(4,\)", weights=torch.ones(3)),
        _bad(ValueError, "reduction must be", reduction="average"),
    ],
)

CASES = [LINEAR_CROSS_ENTROPY, CONTRASTIVE_LOSS]
