"""Cases of the subspace logits."""

import torch
from torch.nn import functional as F

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn
from weft.ops.pairwise.cases.inputs import orthonormal


def plain_subspace_logits(
    x, bases, *, dims=None, gamma=None, squared=False, normalize=False, eps=0.0, check=False
):
    """The head as its authors wrote it: normalise, one linear layer, norm over k columns."""
    C, D, k = bases.shape
    if dims is not None:
        unused = torch.arange(k, device=x.device) >= dims[:, None]
        bases = bases.masked_fill(unused[:, None, :], 0)
    if normalize:
        x = F.normalize(x, dim=-1, eps=eps or 1e-12)
    z = F.linear(x, bases.mT.reshape(C * k, D)).reshape(x.shape[0], C, k)
    out = z.square().sum(-1) if squared else z.norm(dim=-1)
    return out if gamma is None else gamma * out


def _logits(B, C, D, k, *, view=None):
    def make(dtype, device):
        x, bases = randn(B, D, dtype=dtype, device=device), orthonormal(C, D, k, dtype, device)
        return view(x, bases) if view else (x, bases)

    return make


DIMS = torch.tensor([4, 1, 0, 3, 2, 4])


def _padding_is_nan(x, bases):
    unused = torch.arange(bases.shape[2], device=x.device) >= DIMS.to(x.device)[:, None]
    return x, bases.masked_fill(unused[:, None, :], torch.nan)


HEAD = {"gamma": 25.0, "normalize": True}

SUBSPACE_LOGITS_SAMPLES = [
    Sample("plain", _logits(5, 3, 7, 2)),
    Sample("head", _logits(5, 3, 7, 2), HEAD),
    Sample("squared", _logits(3, 4, 5, 3), {"squared": True, "gamma": 2.0}),
    Sample("squared_head", _logits(3, 4, 5, 3), {"squared": True, **HEAD}),
    Sample("eps", _logits(4, 3, 6, 2), {"normalize": True, "eps": 1.5}),
    Sample("one_dimension", _logits(1, 1, 1, 1)),
    Sample("whole_space", _logits(2, 2, 3, 3)),
    Sample("prime", _logits(37, 41, 67, 5), HEAD),
    Sample("contiguous_bases", _logits(4, 3, 6, 2, view=lambda x, s: (x, s.contiguous())), HEAD),
    Sample("transposed", _logits(4, 3, 6, 2, view=lambda x, s: (x.T.contiguous().T, s)), HEAD),
    Sample(
        "sliced", _logits(8, 6, 12, 4, view=lambda x, s: (x[::2, 1::2], s[1::2, 1::2, ::2])), HEAD
    ),
    Sample("expanded", _logits(1, 1, 6, 2, view=lambda x, s: (x.expand(4, 6), s.expand(3, 6, 2)))),
    Sample("ragged", _logits(5, 6, 11, 4, view=_padding_is_nan), {"dims": DIMS, **HEAD}),
    Sample("no_samples", _logits(0, 3, 7, 2), HEAD),
    Sample("no_classes", _logits(5, 0, 7, 2), HEAD),
    Sample("no_columns", _logits(5, 3, 7, 0), HEAD),
    Sample("no_features", _logits(5, 3, 0, 0), HEAD),
]


def _bad_logits(error, match, x=(5, 7), bases=(3, 7, 2), x_dtype=torch.float32, **options):
    make = lambda: (torch.ones(x, dtype=x_dtype), torch.ones(bases))  # noqa: E731
    return BadInput(make, error, match, options)


def _head(B, C, D, k, quick=False):
    product = 2.0 * B * C * k * D
    return Workload(
        f"B={B} C={C} D={D} k={k}",
        _logits(B, C, D, k),
        flops=product,
        backward_flops=2 * product,
        bytes=lambda size: size * (B * D + C * k * D + B * C),
        options=HEAD,
        quick=quick,
    )


SUBSPACE_LOGITS = OpCases(
    name="subspace_logits",
    plain=plain_subspace_logits,
    samples=SUBSPACE_LOGITS_SAMPLES,
    workloads=[
        _head(128, 100, 512, 4, quick=True),
        *(_head(256, 1000, 2048, k) for k in (1, 4, 8, 16)),
    ],
    bad=[
        _bad_logits(ValueError, r"x must be \(B, D\)", x=(7,)),
        _bad_logits(ValueError, r"bases must be \(C, D, k\)", bases=(3, 7)),
        _bad_logits(ValueError, "D = 7", bases=(3, 8, 2)),
        _bad_logits(ValueError, "k must be <= D", bases=(3, 7, 8)),
        _bad_logits(TypeError, "bases must have the dtype of x", x_dtype=torch.float64),
        _bad_logits(TypeError, "x must be float64", x_dtype=torch.int64),
        _bad_logits(ValueError, "gamma must be", gamma=-1.0),
        _bad_logits(ValueError, "gamma must be", gamma=float("nan")),
        _bad_logits(ValueError, "eps must be", eps=-1.0),
        _bad_logits(TypeError, "dims must be an int64", dims=torch.ones(3)),
        _bad_logits(ValueError, r"dims must be \(3,\)", dims=torch.ones(2, dtype=torch.int64)),
        _bad_logits(ValueError, r"dims must be in \[0, 2\]", dims=torch.tensor([0, 1, 3])),
        _bad_logits(ValueError, "orthonormal", check=True),
    ],
)

CASES = [SUBSPACE_LOGITS]
