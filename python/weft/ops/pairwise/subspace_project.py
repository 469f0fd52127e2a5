"""Projection onto subspaces, or onto what is orthogonal to them."""

from torch import Tensor

from weft.dispatch import transformed
from weft.ops.checks import autocast, check_float, check_orthonormal
from weft.ops.pairwise.subspace_logits import gradient_like
from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
)
from weft.reference.pairwise import subspace_project as formula


def subspace_project(
    x: Tensor, bases: Tensor, complement: bool = False, *, check: bool = False
) -> Tensor:
    r"""Orthogonal projection of each feature onto the span of each basis, or what it leaves.

    .. math::
        \text{out}_{bc} = S_c S_c^\top x_b
            \quad \text{or, as complement,} \quad x_b - S_c S_c^\top x_b

    Args:
        x: features, ``(..., D)`` with one basis, ``(B, D)`` with several.
        bases: one orthonormal basis ``(D, k)``, or one per class ``(C, D, k)``; ``k <= D``, any
            strides. The gradient has D as its unit stride if ``bases`` has, else it is contiguous.
        complement: remove the subspace instead of keeping it.
        check: verify first that the bases are orthonormal (reads them once more).

    Returns:
        ``(..., D)`` with one basis, ``(B, C, D)`` with several; contiguous, in the dtype of ``x``:
        float64, float32, bfloat16 or float16, the same as ``bases``; half precision accumulates in
        float32. Differentiable twice in ``x`` and ``bases``.

    Raises:
        ValueError: shapes, devices, bases that ``check`` refuses.
        TypeError: dtypes that differ or are not supported.

    Source: Golub and Van Loan, "Matrix Computations", section 2.5.1; removing a class's subspace
    from features is a step of many layers, with the bases as parameters or as statistics.
    """
    x, bases = autocast(x, bases)
    check_float(x=x, bases=bases)
    if bases.dim() not in (2, 3):
        raise ValueError(f"bases must be (D, k) or (C, D, k), got {tuple(bases.shape)}")
    D, k = bases.shape[-2:]
    if x.dim() < 1 or x.shape[-1] != D or (bases.dim() == 3 and x.dim() != 2):
        shape = f"(..., {D})" if bases.dim() == 2 else f"(B, {D})"
        raise ValueError(f"x must be {shape}, got {tuple(x.shape)}")
    if k > D:
        raise ValueError(f"bases: {k} columns of length {D} cannot be orthonormal; k must be <= D")
    if check:
        check_orthonormal("bases", bases)
    run = formula.subspace_project if transformed() else forward
    if bases.dim() == 3:
        return run(x, bases, complement)
    rows = x.numel() // D if D else x.shape[:-1].numel()
    return run(x.reshape(rows, D), bases[None], complement).reshape(x.shape)


def _fake(x, bases, complement):
    return x.new_empty(x.shape[0], *bases.shape[:2])


def _reference(x, bases, complement):
    return formula.subspace_project(x, bases, complement).contiguous()


def _fake_backward(grad, x, bases, complement):
    return x.new_empty(x.shape), gradient_like(bases)


def _reference_backward(grad, x, bases, complement):
    grad_x, grad_bases = formula.subspace_project_backward(grad, x, bases, complement)
    return grad_x.contiguous(), gradient_like(bases).copy_(grad_bases)


forward = Op(
    "subspace_project",
    "(Tensor x, Tensor bases, bool complement) -> Tensor",
    family="pairwise",
    fake=_fake,
    implementations=[cpu("subspace_project"), reference(_reference)],
)
backward = Op(
    "subspace_project_backward",
    "(Tensor grad, Tensor x, Tensor bases, bool complement) -> (Tensor grad_x, Tensor grad_bases)",
    family="pairwise",
    fake=_fake_backward,
    implementations=[cpu("subspace_project_backward"), reference(_reference_backward)],
)


def _setup(ctx, inputs, output):
    x, bases, ctx.complement = inputs
    ctx.save_for_backward(x, bases)


def _gradient(ctx, grad):
    return *backward(grad, *ctx.saved_tensors, ctx.complement), None


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(backward, formula.subspace_project_backward, arguments=[0, 1, 2])
