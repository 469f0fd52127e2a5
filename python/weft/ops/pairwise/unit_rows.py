"""Rows of length 1, which cosines are products of."""

from torch import Tensor

from weft.dispatch import transformed
from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.reference.pairwise import unit_rows as formula


def unit_rows(x: Tensor, eps: float = 0.0) -> Tensor:
    """x / max(‖x‖, eps) over the last dimension, contiguous, in the dtype of x; half precision is
    computed in float32. A row of zeros is 0 without eps, and has gradient 0. No square overflows or
    vanishes."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if transformed():
        return formula.unit_rows(rows, eps).reshape(x.shape)
    return forward(rows if rows.stride(1) == 1 else rows.contiguous(), eps).reshape(x.shape)


def _fake(x, eps):
    return x.new_empty(x.shape)


def _reference(x, eps):
    return formula.unit_rows(x, eps).contiguous()


def _fake_backward(grad, x, eps):
    return x.new_empty(x.shape)


def _reference_backward(grad, x, eps):
    return formula.unit_rows_backward(grad, x, eps).contiguous()


forward = Op(
    "unit_rows",
    "(Tensor x, float eps) -> Tensor",
    family="pairwise",
    fake=_fake,
    implementations=[
        cpu("unit_rows"),
        triton("pairwise.unit", "unit"),
        reference(_reference),
    ],
)
backward = Op(
    "unit_rows_backward",
    "(Tensor grad, Tensor x, float eps) -> Tensor",
    family="pairwise",
    fake=_fake_backward,
    implementations=[
        cpu("unit_rows_backward"),
        triton("pairwise.unit", "unit_backward"),
        reference(_reference_backward),
    ],
)


def _setup(ctx, inputs, output):
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _gradient(ctx, grad):
    return backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(
    backward, lambda *args: (formula.unit_rows_backward(*args),), arguments=[0, 1]
)
