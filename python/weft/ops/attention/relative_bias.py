"""A table read by relative position, with a gradient that repeats bit for bit."""

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.checks import values_are_checked
from weft.ops.registration import FLOATS, Op, cpu, reference, register_gradient
from weft.reference.attention import relative_bias as formula


def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    r"""A learned bias of attention that depends on the relative position alone.

    .. math:: \text{bias}_{hij} = \text{table}_{\text{index}_{ij}, h}

    ``weft.RelativeBias(table, index)`` as the ``bias`` of an attention means this. The gradient of
    an entry adds its pairs in their order: the same bits at every run and on every device.

    Args:
        table: ``(T, H)`` float64, float32, bfloat16 or float16, any strides.
        index: ``(Nq, Nk)`` int64 in [0, T).

    Returns:
        ``(1, H, Nq, Nk)`` in the dtype of table, differentiable twice. Half precision sums its
        gradient in float32.

    Raises:
        ValueError: shapes or devices that do not match; an index out of range (on the CPU; on a GPU
            with ``weft.check_values(True)``, else undefined).
        TypeError: dtypes that are not supported.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    ICCV 2021, equation 4.
    """
    if not isinstance(table, Tensor) or table.dtype not in FLOATS:
        raise TypeError(f"table must be a float tensor, got {getattr(table, 'dtype', type(table))}")
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(
            f"index must be an int64 tensor, got {getattr(index, 'dtype', type(index))}"
        )
    if table.dim() != 2 or index.dim() != 2 or index.device != table.device:
        raise ValueError(
            "table must be (T, H) and index (Nq, Nk) on its device, got "
            f"{tuple(table.shape)} and {tuple(index.shape)} on {index.device}"
        )
    T = table.shape[0]
    if values_are_checked(index) and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= T:
            raise ValueError(f"index must be in [0, {T}), got {low} to {high}")
    return (formula.relative_bias if transformed() else forward)(table, index)


def _fake(table, index):
    return table.new_empty(1, table.shape[1], *index.shape)


def _reference(table, index):
    return formula.relative_bias(table, index).contiguous()


def _reference_backward(grad, index, T):
    return formula.relative_bias_backward(grad, index, T)


def _fake_backward(grad, index, T):
    return grad.new_empty(T, grad.shape[1])


forward = Op(
    "relative_bias",
    "(Tensor table, Tensor index) -> Tensor",
    family="attention",
    fake=_fake,
    implementations=[
        cpu("relative_bias"),
        reference(_reference),
    ],
)
backward = Op(
    "relative_bias_backward",
    "(Tensor grad, Tensor index, SymInt T) -> Tensor",
    family="attention",
    fake=_fake_backward,
    implementations=[
        cpu("relative_bias_backward"),
        reference(_reference_backward),
    ],
)


def _setup(ctx, inputs, output):
    table, index = inputs
    ctx.save_for_backward(index)
    ctx.T = table.shape[0]


def _gradient(ctx, grad):
    (index,) = ctx.saved_tensors
    return backward(grad, index, ctx.T), None


def _setup_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _gradient_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return forward(grad, index), None, None


register_gradient(forward, _setup, _gradient)
register_gradient(backward, _setup_backward, _gradient_backward)
