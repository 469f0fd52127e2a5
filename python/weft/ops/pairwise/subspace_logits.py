"""Subspace logits: the head of the Grassmann class representation."""

import math

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.checks import autocast, check_dims, check_float, check_orthonormal
from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.reference.pairwise import subspace_logits as formula

# The backward needs the projections z again. Up to this size they are kept by the forward, which
# saves a fourth of the work of a training step; above it the backward recomputes them, so that the
# memory an op takes beyond its results does not grow with B·C·k.
SAVED_BYTES = 32 << 20


def subspace_logits(
    x: Tensor,
    bases: Tensor,
    *,
    dims: Tensor | None = None,
    gamma: float | None = None,
    squared: bool = False,
    normalize: bool = False,
    eps: float = 0.0,
    check: bool = False,
) -> Tensor:
    r"""Length of the projection of each feature onto each class's subspace.

    .. math::
        \text{out}_{bc} = \gamma \, \lVert S_c^\top \hat x_b \rVert_2, \qquad
        \hat x_b = x_b / \max(\lVert x_b \rVert_2, \text{eps}) \text{ if normalize, else } x_b

    Args:
        x: features, ``(B, D)``.
        bases: one orthonormal basis per class, ``(C, D, k)``, ``k <= D``, any strides. The layout
            of the matrix product is ``(C, k, D)``: a layer stores that and passes the transposed
            view. The gradient has D as its unit stride if ``bases`` has, else it is contiguous.
        dims: subspace dimension of each class, ``(C,)`` int64 in ``[0, k]``; None means k. Columns
            from ``dims[c]`` on are never read and get gradient 0.
        gamma: scale of the logits, >= 0; None means 1 (25 in the paper).
        squared: ``gamma * ||.||^2`` in place of ``gamma * ||.||``.
        normalize: project the direction of x. A zero feature without ``eps`` has logits 0.
        eps: lower bound of the length that ``normalize`` divides by, >= 0.
        check: verify first that the bases are orthonormal (reads them once more).

    Returns:
        ``(B, C)``, contiguous, in the dtype of ``x``: float64, float32, bfloat16 or float16, the
        same as ``bases``; half precision accumulates in float32. Differentiable twice in ``x`` and
        ``bases``; where a projection is 0, its first and second derivatives are 0.

    Raises:
        ValueError: shapes, devices, ``dims`` or scalars out of range, bases that ``check`` refuses.
        TypeError: dtypes that differ or are not supported.

    Source: Wang et al., "Get the Best of Both Worlds: Improving Accuracy and Transferability by
    Grassmann Class Representation", ICCV 2023, equations 3 and 4.
    """
    x, bases = autocast(x, bases)
    gamma = 1.0 if gamma is None else float(gamma)
    _check(x, bases, dims, gamma, eps)
    if check:
        check_orthonormal("bases", bases, dims)
    if transformed():
        return formula.subspace_logits(x, bases, dims, gamma, squared, normalize, eps)
    save = torch.is_grad_enabled() and (x.requires_grad or bases.requires_grad)
    save = save and x.shape[0] * bases.shape[0] * bases.shape[2] * x.itemsize <= SAVED_BYTES
    return forward(x, bases, dims, gamma, squared, normalize, float(eps), save)[0]


def _check(x, bases, dims, gamma, eps):
    check_float(x=x, bases=bases)
    if x.dim() != 2:
        raise ValueError(f"x must be (B, D), got {tuple(x.shape)}")
    if bases.dim() != 3 or bases.shape[1] != x.shape[1]:
        raise ValueError(f"bases must be (C, D, k) with D = {x.shape[1]}, got {tuple(bases.shape)}")
    C, D, k = bases.shape
    if k > D:
        raise ValueError(f"bases: {k} columns of length {D} cannot be orthonormal; k must be <= D")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be finite and >= 0, got {gamma}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    check_dims(dims, C, k, x.device)


def gradient_like(bases: Tensor) -> Tensor:
    """An uninitialised gradient of ``bases`` in the layout that the docstring promises."""
    C, D, k = bases.shape
    if bases.stride(1) == 1:
        return bases.new_empty(C, k, D).transpose(1, 2)
    return bases.new_empty(C, D, k)


def _fake(x, bases, dims, gamma, squared, normalize, eps, save):
    """The projections z, which the backward reads, are (C, k, B): a norm is a sum over k rows."""
    (B, _), (C, _, k) = x.shape, bases.shape
    return x.new_empty(B, C), x.new_empty((C, k, B) if save else (0,))


def _reference(x, bases, dims, gamma, squared, normalize, eps, save):
    z = formula.subspace_projections(x, bases, dims, normalize, eps)
    logits = formula.logits_of_projections(z, gamma, squared).to(x.dtype)
    projections = z.to(x.dtype).permute(1, 2, 0) if save else x.new_empty(0)
    return logits.contiguous(), projections.contiguous()


def _fake_backward(grad, x, bases, dims, projections, gamma, squared, normalize, eps):
    return x.new_empty(x.shape), gradient_like(bases)


def _formula_backward(grad, x, bases, dims, projections, *options):
    return formula.subspace_logits_backward(grad, x, bases, dims, *options)


def _reference_backward(*args):
    grad_x, grad_bases = _formula_backward(*args)
    return grad_x.contiguous(), gradient_like(args[2]).copy_(grad_bases)


forward = Op(
    "subspace_logits",
    "(Tensor x, Tensor bases, Tensor? dims, float gamma, bool squared, bool normalize, float eps, "
    "bool save) -> (Tensor logits, Tensor projections)",
    family="pairwise",
    fake=_fake,
    implementations=[
        cpu("subspace_logits"),
        triton("pairwise.subspace_logits", "subspace_logits"),
        reference(_reference),
    ],
)
backward = Op(
    "subspace_logits_backward",
    "(Tensor grad, Tensor x, Tensor bases, Tensor? dims, Tensor projections, float gamma, "
    "bool squared, bool normalize, float eps) -> (Tensor grad_x, Tensor grad_bases)",
    family="pairwise",
    fake=_fake_backward,
    implementations=[
        cpu("subspace_logits_backward"),
        triton("pairwise.subspace_logits", "subspace_logits_backward"),
        reference(_reference_backward),
    ],
)


def _setup(ctx, inputs, output):
    x, bases, dims, *ctx.options, _ = inputs
    projections = output[1]
    ctx.mark_non_differentiable(projections)
    ctx.save_for_backward(x, bases, dims, projections)


def _gradient(ctx, grad, _):
    grads = backward(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None, None


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(backward, _formula_backward, arguments=[0, 1, 2])
