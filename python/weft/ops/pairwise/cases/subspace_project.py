"""Cases of the projection onto subspaces."""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn
from weft.ops.pairwise.cases.inputs import orthonormal


def plain_subspace_project(x, bases, complement=False, *, check=False):
    """Two matrix products."""
    if bases.dim() == 2:
        out = (x @ bases) @ bases.T
        return x - out if complement else out
    out = torch.einsum("bck,cdk->bcd", torch.einsum("bd,cdk->bck", x, bases), bases)
    return x[:, None] - out if complement else out


def _several(B, C, D, k, *, view=None):
    def make(dtype, device):
        x, bases = randn(B, D, dtype=dtype, device=device), orthonormal(C, D, k, dtype, device)
        return view(x, bases) if view else (x, bases)

    return make


def _one(shape, D, k):
    def make(dtype, device):
        x = randn(*shape, D, dtype=dtype, device=device)
        return x, orthonormal(1, D, k, dtype, device)[0]

    return make


COMPLEMENT = {"complement": True}

SAMPLES = [
    Sample("several", _several(5, 3, 7, 2)),
    Sample("several_complement", _several(5, 3, 7, 2), COMPLEMENT),
    Sample("one", _one((4,), 6, 2)),
    Sample("one_complement", _one((4,), 6, 2), COMPLEMENT),
    Sample("vector", _one((), 6, 2)),
    Sample("three_dimensions", _one((2, 3), 5, 2), COMPLEMENT),
    Sample("prime", _several(67, 5, 41, 7), COMPLEMENT),
    Sample("one_dimension", _several(1, 1, 1, 1)),
    Sample("contiguous_bases", _several(4, 3, 6, 2, view=lambda x, s: (x, s.contiguous()))),
    Sample("transposed", _several(4, 3, 6, 2, view=lambda x, s: (x.T.contiguous().T, s))),
    Sample("sliced", _several(8, 6, 12, 4, view=lambda x, s: (x[::2, 1::2], s[1::2, 1::2, ::2]))),
    Sample("expanded", _several(1, 1, 6, 2, view=lambda x, s: (x.expand(4, 6), s.expand(3, 6, 2)))),
    Sample("no_samples", _several(0, 3, 7, 2), COMPLEMENT),
    Sample("no_classes", _several(5, 0, 7, 2), COMPLEMENT),
    Sample("no_columns", _several(5, 3, 7, 0), COMPLEMENT),
    Sample("no_features", _one((4,), 0, 0), COMPLEMENT),
]


def _bad(error, match, x=(5, 7), bases=(3, 7, 2), x_dtype=torch.float32, **options):
    make = lambda: (torch.ones(x, dtype=x_dtype), torch.ones(bases))  # noqa: E731
    return BadInput(make, error, match, options)


def _workload(name, make, B, C, D, k, quick=False):
    """Two products; reads x and the bases, writes B × C × D."""
    return Workload(
        name,
        make,
        flops=4.0 * B * C * D * k,
        backward_flops=10.0 * B * C * D * k,
        bytes=lambda size: size * (B * D + C * D * k + B * C * D),
        options=COMPLEMENT,
        quick=quick,
    )


SUBSPACE_PROJECT = OpCases(
    name="subspace_project",
    plain=plain_subspace_project,
    samples=SAMPLES,
    workloads=[
        _workload("N=4096 D=768 k=16", _one((4096,), 768, 16), 4096, 1, 768, 16, quick=True),
        _workload("N=65536 D=768 k=64", _one((65536,), 768, 64), 65536, 1, 768, 64),
        _workload("B=256 C=100 D=512 k=8", _several(256, 100, 512, 8), 256, 100, 512, 8),
    ],
    bad=[
        _bad(ValueError, r"bases must be \(D, k\) or \(C, D, k\)", bases=(7,)),
        _bad(ValueError, "k must be <= D", bases=(7, 8)),
        _bad(ValueError, r"x must be \(B, 7\)", x=(5, 6)),
        _bad(ValueError, r"x must be \(B, 7\)", x=(2, 5, 7)),
        _bad(ValueError, r"x must be \(\.\.\., 7\)", x=(5, 6), bases=(7, 2)),
        _bad(TypeError, "bases must have the dtype of x", x_dtype=torch.float64),
        _bad(TypeError, "x must be float64", x_dtype=torch.int64),
        _bad(ValueError, "orthonormal", check=True),
    ],
)

CASES = [SUBSPACE_PROJECT]
