"""What the ops of dense reductions share: the gradients that are wanted, and their shapes."""

from torch import Tensor

GRADIENTS = (
    "(Tensor grad_x, Tensor grad_y, Tensor grad_row_factor, Tensor grad_column_factor, "
    "Tensor grad_bias)"
)


def wanted_of(ctx, tensors: tuple) -> int:
    """Bit p is set where a gradient of the p-th tensor of a pair's schema is asked for."""
    needed = ctx.needs_input_grad[:5]
    return sum(1 << p for p, (t, n) in enumerate(zip(tensors, needed, strict=True)) if n)


def _is_wanted(tensor: Tensor | None, position: int, wanted: int) -> bool:
    return tensor is not None and bool(wanted >> position & 1)


def fake_gradients(tensors: tuple, wanted: int) -> tuple[Tensor, ...]:
    """Shapes of ``GRADIENTS``: those not wanted, or of nothing, have size 0."""
    return tuple(
        t.new_empty(t.shape) if _is_wanted(t, p, wanted) else tensors[0].new_empty(0)
        for p, t in enumerate(tensors)
    )


def only_wanted(grads: tuple, tensors: tuple, wanted: int) -> tuple[Tensor, ...]:
    """The reference computes all."""
    return tuple(
        g if _is_wanted(t, p, wanted) else tensors[0].new_empty(0)
        for p, (g, t) in enumerate(zip(grads, tensors, strict=True))
    )


def or_none(grads: tuple, tensors: tuple, wanted: int) -> list[Tensor | None]:
    """For autograd, which wants None."""
    return [
        g if _is_wanted(t, p, wanted) else None
        for p, (g, t) in enumerate(zip(grads, tensors, strict=True))
    ]
