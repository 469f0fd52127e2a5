"""Cases of the Grassmann step."""

import torch
from torch import Tensor

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn
from weft.ops.pairwise.cases.inputs import orthonormal


def _without_columns(t: Tensor, dims: Tensor | None) -> Tensor:
    if dims is None:
        return t
    return t.masked_fill((torch.arange(t.shape[2], device=t.device) >= dims[:, None])[:, None], 0)


def plain_grassmann_step(
    basis,
    buffer,
    lr,
    *,
    grad=None,
    momentum=0.0,
    dampening=0.0,
    dims=None,
    reorth="qr_signed",
    transport=None,
):
    """The step as the paper's authors wrote it: a thin SVD of the tangent, and a QR."""
    dtype = basis.dtype
    if dtype in (torch.bfloat16, torch.float16):  # LAPACK knows neither
        basis, buffer, grad = (None if t is None else t.float() for t in (basis, buffer, grad))
    P, G = _without_columns(basis, dims), _without_columns(buffer, dims)
    if grad is not None:
        G = momentum * G + (1 - dampening) * _without_columns(grad, dims)
    H = G - P @ (P.mT @ G)
    U, S, Vh = torch.linalg.svd(H, full_matrices=False)
    cosine, sine = (-lr * S).cos()[:, None], (-lr * S).sin()[:, None]
    rotated = P @ Vh.mT
    new = (rotated * cosine + U * sine) @ Vh
    if transport is None:
        transport = reorth != "gcr"
    if transport:
        G = ((U * cosine - rotated * sine) * S[:, None]) @ Vh
    for c in range(len(P) if reorth else 0):
        k = P.shape[2] if dims is None else int(dims[c])
        Q, R = torch.linalg.qr(new[c, :, :k])
        if reorth in ("polar", "newton_schulz"):
            left, _, right = torch.linalg.svd(new[c, :, :k], full_matrices=False)
            Q = left @ right
        elif reorth == "qr_signed":
            Q = Q * R.diagonal().sign()
        new[c, :, :k] = Q
    return new.to(dtype), G.to(dtype)


def _step(C, D, k, *, scale=1.0, contiguous=False, view=None):
    def make(dtype, device):
        basis = orthonormal(C, D, k, dtype, device)
        buffer = randn(C, k, D, dtype=dtype, device=device, seed=2).mT * scale
        if contiguous:
            basis, buffer = basis.contiguous(), buffer.contiguous()
        return view(basis, buffer) if view else (basis, buffer)

    return make


DIMS = torch.tensor([4, 1, 0, 3, 2, 4])


def _padding_is_nan(basis, buffer):
    unused = torch.arange(basis.shape[2], device=basis.device) >= DIMS.to(basis.device)[:, None]
    return tuple(t.masked_fill(unused[:, None, :], torch.nan) for t in (basis, buffer))


LR = {"lr": 0.1}

STEP_SAMPLES = [
    Sample("plain", _step(3, 7, 2), LR),
    Sample("no_reorth", _step(3, 7, 2), {"reorth": None, **LR}),
    Sample("polar", _step(4, 9, 3), {"reorth": "polar", **LR}),
    Sample("newton_schulz", _step(4, 9, 3), {"reorth": "newton_schulz", **LR}),
    Sample("gcr", _step(5, 9, 4), {"reorth": "gcr", **LR}),
    Sample("euclidean", _step(3, 7, 2), {"transport": False, **LR}),
    Sample("ascent", _step(3, 7, 2), {"lr": -0.3}),
    Sample("one_column", _step(2, 5, 1), LR),
    Sample("prime", _step(5, 197, 11), LR),
    Sample("panels", _step(2, 300, 32), LR),
    Sample("large_angles", _step(2, 41, 5, scale=20.0), LR),
    Sample("tiny", _step(2, 41, 5, scale=1e-4), LR),
    Sample("still", _step(2, 13, 3, scale=0.0), LR),
    Sample("contiguous", _step(3, 150, 6, contiguous=True), LR),
    Sample("sliced", _step(6, 22, 6, view=lambda p, b: (p[::2, :, ::2], b[1::2, :, 1::2])), LR),
    Sample("ragged", _step(6, 11, 4, view=_padding_is_nan), {"dims": DIMS, **LR}),
    Sample(
        "ragged_gcr", _step(6, 11, 4, view=_padding_is_nan), {"dims": DIMS, "reorth": "gcr", **LR}
    ),
    Sample("no_classes", _step(0, 7, 2), LR),
    Sample("no_columns", _step(3, 7, 0), LR),
]


def _bad_step(error, match, basis=(3, 7, 2), buffer=(3, 7, 2), dtype=torch.float32, **options):
    make = lambda: (torch.ones(basis), torch.ones(buffer, dtype=dtype))  # noqa: E731
    return BadInput(make, error, match, {**LR, **options})


def _classes(C, D, k, quick=False):
    return Workload(
        f"C={C} D={D} k={k}",
        _step(C, D, k, scale=0.01),
        flops=2.0 * C * D * k * k * 8,  # PᵀG, P·, H·H, four products of the results, PᵀP, P·R⁻¹
        bytes=lambda size: size * 4 * C * D * k,
        options=LR,
        quick=quick,
    )


GRASSMANN_STEP = OpCases(
    name="grassmann_step",
    plain=plain_grassmann_step,
    samples=STEP_SAMPLES,
    workloads=[_classes(100, 512, 4, quick=True), *(_classes(1000, 2048, k) for k in (4, 8, 16))],
    bad=[
        _bad_step(ValueError, r"basis must be \(C, D, k\)", basis=(3, 7)),
        _bad_step(ValueError, "k must be <= D", basis=(3, 2, 7), buffer=(3, 2, 7)),
        _bad_step(ValueError, "buffer must have the shape of basis", buffer=(3, 7, 1)),
        _bad_step(TypeError, "buffer must have the dtype of basis", dtype=torch.float64),
        _bad_step(ValueError, "grad must have the shape of basis", grad=torch.ones(3, 7)),
        _bad_step(TypeError, "grad must be a tensor", grad=1.0),
        _bad_step(ValueError, "lr must be finite", lr=float("nan")),
        _bad_step(ValueError, "momentum must be finite", momentum=float("inf")),
        _bad_step(ValueError, "reorth must be one of", reorth="qr"),
        _bad_step(TypeError, "dims must be an int64", dims=torch.ones(3)),
        _bad_step(ValueError, r"dims must be \(3,\)", dims=torch.ones(2, dtype=torch.int64)),
        _bad_step(ValueError, r"dims must be in \[0, 2\]", dims=torch.tensor([0, 1, 3])),
    ],
    differentiable=False,
    transformable=False,
)

CASES = [GRASSMANN_STEP]
