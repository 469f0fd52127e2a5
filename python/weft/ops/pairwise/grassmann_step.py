"""One step of momentum descent on the Grassmann manifold, for the bases of many classes at once."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from weft.dispatch import Implementation
from weft.ops.checks import check_dims, check_float
from weft.ops.pairwise.subspace_logits import gradient_like
from weft.ops.registration import Op, cpu, cuda, reference, register_no_gradient
from weft.reference.pairwise import grassmann_step as formula
from weft.reference.pairwise.grassmann_step import REORTH

CUDA_COLUMNS = 32


def grassmann_step(
    basis: Tensor,
    buffer: Tensor,
    lr: float,
    *,
    grad: Tensor | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    dims: Tensor | None = None,
    reorth: str | None = "qr_signed",
    transport: bool | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Moves each class's subspace along the geodesic opposite to its momentum.

    .. math::
        H &= G - P P^\top G, \qquad H^\top H = V \Lambda V^\top, \qquad \alpha = -\text{lr} \\
        P' &= P\,V \cos(\alpha\sqrt\Lambda) V^\top
              + H\,V \frac{\sin(\alpha\sqrt\Lambda)}{\sqrt\Lambda} V^\top \\
        G' &= H\,V \cos(\alpha\sqrt\Lambda) V^\top
              - P\,V \sqrt\Lambda \sin(\alpha\sqrt\Lambda) V^\top

    Both functions of :math:`H^\top H` are entire, so the kernels need no singular values: these may
    repeat, vanish or differ in scale.

    Args:
        basis: P, orthonormal columns, ``(C, D, k)``, ``k <= D``, any strides (a layer stores
            ``(C, k, D)`` and passes the transposed view).
        buffer: G, the momentum or the gradient, ``(C, D, k)``, any strides.
        lr: length of the step; finite. A negative one ascends.
        grad: if given, ``G = momentum * buffer + (1 - dampening) * grad`` comes first, in the same
            pass over memory.
        momentum, dampening: as above; without effect where ``grad`` is None.
        dims: subspace dimension of each class, ``(C,)`` int64 in ``[0, k]``; None means k. Columns
            from ``dims[c]`` on are never read and are 0 in both results.
        reorth: how rounding is kept from accumulating in the new basis. None: not at all.
            ``"qr_signed"``: Q of its QR with a positive diagonal of R. ``"polar"``:
            ``P (PᵀP)^(-1/2)``, the nearest orthonormal matrix. ``"newton_schulz"``: the same by the
            iteration ``P (3 I − PᵀP)/2``. ``"gcr"``: Q of ``torch.linalg.qr``, as in the paper's
            code. Its column signs are those of Householder's reflections: a flipped column with a
            momentum that is not makes the momentum point away from where it was gathered. Use it
            to reproduce published runs only.
        transport: return the velocity at the end of the geodesic, G' above, which is tangent at the
            new basis and as long as H. False returns G itself, Euclidean, as the paper's code
            keeps it; the default, None, does so for ``"gcr"`` only.

    Returns:
        The new basis and the new buffer, ``(C, D, k)`` in the dtype of ``basis``: float64, float32,
        bfloat16 or float16, the same for all inputs; half precision is computed in float32 and
        rounded at the end. D is their unit stride if it is that of ``basis``, else they are
        contiguous. ``‖αH‖_F`` beyond 2^20 rad is shortened to that. Not differentiable.

    Raises:
        ValueError: shapes, devices, ``dims``, scalars out of range, an unknown ``reorth``.
        TypeError: dtypes that differ or are not supported.
        RuntimeError: a gradient is asked of it.

    Source: Edelman, Arias, Smith, "The Geometry of Algorithms with Orthogonality Constraints",
    1998, theorems 2.3 and 2.4; Wang et al., "Get the Best of Both Worlds: Improving Accuracy and
    Transferability by Grassmann Class Representation", ICCV 2023, algorithm 1.
    """
    return forward(
        *_arguments(basis, buffer, lr, grad, momentum, dampening, dims, reorth, transport)
    )


def grassmann_step_(
    basis: Tensor,
    buffer: Tensor,
    lr: float,
    *,
    grad: Tensor | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    dims: Tensor | None = None,
    reorth: str | None = "qr_signed",
    transport: bool | None = None,
) -> None:
    """:func:`grassmann_step` that writes its results over ``basis`` and ``buffer``, without copies.

    Args:
        basis, buffer, lr, grad, momentum, dampening, dims, reorth, transport: as there, except that
            ``basis`` and ``buffer`` may not share memory, nor overlap themselves.

    Returns:
        None. Where ``transport`` is off and ``grad`` is None, ``buffer`` is left as it is.

    Raises:
        ValueError, TypeError: as there.
        RuntimeError: ``basis`` or ``buffer`` requires a gradient and gradients are being recorded.

    Source: as there.
    """
    args = _arguments(basis, buffer, lr, grad, momentum, dampening, dims, reorth, transport)
    for name, tensor in (("basis", basis), ("buffer", buffer)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(f"{name} requires a gradient: step inside torch.no_grad()")
        if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(
                f"{name} is broadcast and cannot be written, strides {tensor.stride()}"
            )
    step_(*args)


def _arguments(basis, buffer, lr, grad, momentum, dampening, dims, reorth, transport):
    others = {} if grad is None else {"grad": grad}
    check_float(basis=basis, buffer=buffer, **others)
    if basis.dim() != 3:
        raise ValueError(f"basis must be (C, D, k), got {tuple(basis.shape)}")
    C, D, k = basis.shape
    if k > D:
        raise ValueError(f"basis: {k} columns of length {D} cannot be orthonormal; k must be <= D")
    for name, tensor in {"buffer": buffer, **others}.items():
        if tensor.shape != basis.shape:
            raise ValueError(
                f"{name} must have the shape of basis, {tuple(basis.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    for name, value in {"lr": lr, "momentum": momentum, "dampening": dampening}.items():
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    if reorth not in REORTH:
        raise ValueError(f"reorth must be one of {REORTH}, got {reorth!r}")
    check_dims(dims, C, k, basis.device)
    transport = reorth != "gcr" if transport is None else bool(transport)
    scalars = (float(lr), float(momentum), float(dampening))
    return basis, buffer, grad, dims, *scalars, reorth, transport


def _native(known: Implementation) -> Implementation:
    """The kernels know ``reorth`` by its number, and read contiguous ``dims``."""

    def run(basis, buffer, grad, dims, lr, momentum, dampening, reorth, transport):
        dims = None if dims is None else dims.contiguous()
        number = REORTH.index(reorth)
        known.run(basis, buffer, grad, dims, lr, momentum, dampening, number, transport)

    return replace(known, run=run)


def _reference_(basis, buffer, *others):
    new_basis, new_buffer = formula.grassmann_step(basis, buffer, *others)
    basis.copy_(new_basis)
    buffer.copy_(new_buffer)


def _functional(known: Implementation) -> Implementation:
    """The step on copies."""

    def run(basis, buffer, *others):
        basis, buffer = (gradient_like(basis).copy_(t) for t in (basis, buffer))
        known.run(basis, buffer, *others)
        return basis, buffer

    return replace(known, run=run)


def _too_wide(basis, *_):
    k = basis.shape[2]
    return f"takes k <= {CUDA_COLUMNS}, not {k}" if k > CUDA_COLUMNS else None


IMPLEMENTATIONS = [
    _native(cpu("grassmann_step_")),
    _native(cuda("grassmann_step_", frozenset({torch.float32}), _too_wide)),
    reference(_reference_),
]
SCHEMA = (
    "(Tensor{a} basis, Tensor{b} buffer, Tensor? grad, Tensor? dims, float lr, float momentum, "
    "float dampening, str? reorth, bool transport) -> "
)

step_ = Op(
    "grassmann_step_",
    SCHEMA.format(a="(a!)", b="(b!)") + "()",
    family="pairwise",
    fake=lambda *_: None,
    implementations=IMPLEMENTATIONS,
)
forward = Op(
    "grassmann_step",
    SCHEMA.format(a="", b="") + "(Tensor new_basis, Tensor new_buffer)",
    family="pairwise",
    fake=lambda basis, *_: (gradient_like(basis), gradient_like(basis)),
    implementations=[_functional(known) for known in IMPLEMENTATIONS],
)
register_no_gradient(forward, "it is a step of an optimizer")


def _count_versions(keyset, *args):
    """What is saved for a backward and then stepped over raises there, as after any in-place op."""
    torch.autograd.graph.increment_version(args[:2])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return step_.overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)


_library = torch.library.Library("weft", "FRAGMENT")
_library.impl("grassmann_step_", _count_versions, "ADInplaceOrView", with_keyset=True)
