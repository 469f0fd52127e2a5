"""The ops on the costs between points that transport is made of. None of them, the matrix of costs
apart, keeps one.

Every gradient is that of Q = Σ_ij e_ij ⟨L_i, R_j⟩ (``points_product_backward``), composed."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from weft.dispatch import Implementation
from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.reference.transport import sinkhorn_points as formulas
from weft.reference.transport.sinkhorn_points import Points

SCHEMA = (
    "Tensor x, Tensor y, Tensor epsilon, Tensor? rows, Tensor? columns, str cost, str precision"
)
COUNT = 7  # arguments of SCHEMA
DTYPES = frozenset({torch.float64, torch.float32})
FLOAT32 = frozenset({torch.float32})


def points_of(args: tuple) -> Points:
    """The first arguments of an op as one object."""
    return Points(*args[:COUNT])


def arguments_of(p: Points) -> tuple:
    """In the order of ``SCHEMA``."""
    return (p.x, p.y, p.epsilon, p.rows, p.columns, p.cost, p.precision)


def spread(grad_x: Tensor, grad_y: Tensor, grad_epsilon: Tensor) -> tuple:
    """Gradients of the arguments of SCHEMA."""
    return grad_x, grad_y, grad_epsilon, None, None, None, None


def save(ctx, inputs: tuple, *tensors: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5], *tensors)
    ctx.words = inputs[5:COUNT]


def saved(ctx) -> tuple[tuple, tuple[Tensor, ...]]:
    """The arguments of SCHEMA, and the other tensors."""
    return (*ctx.saved_tensors[:5], *ctx.words), ctx.saved_tensors[5:]


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


def _fake_softmin(*args):
    return args[0].new_empty(args[0].shape[:2])


def _reference_softmin(*args):
    return formulas.softmin(points_of(args), *args[COUNT:]).contiguous()


softmin = Op(
    "points_softmin",
    f"({SCHEMA}, Tensor g, Tensor weight) -> Tensor",
    family="transport",
    fake=_fake_softmin,
    implementations=[
        cpu("points_softmin", dtypes=DTYPES),
        triton("transport.points_softmin", "points_softmin", dtypes=FLOAT32),
        reference(_reference_softmin),
    ],
)


def composed(run: Callable) -> list[Implementation]:
    """What is made of the ops here, as each of their compiled implementations."""
    return [replace(known, run=run) for known in softmin.dispatcher.implementations[:-1]]


def _fake_product(*args):
    return args[0].new_empty(*args[0].shape[:2], args[-1].shape[2])


def _reference_product(*args):
    return formulas.product(points_of(args), *args[COUNT:]).contiguous()


product = Op(
    "points_product",
    f"({SCHEMA}, Tensor f, Tensor g, Tensor values) -> Tensor",
    family="transport",
    fake=_fake_product,
    implementations=[
        cpu("points_product", dtypes=DTYPES),
        triton("transport.points_product", "points_product", dtypes=FLOAT32),
        reference(_reference_product),
    ],
)


def _fake_product_backward(*args):
    x, y, epsilon = args[:3]
    return _like(x, y, epsilon, *args[COUNT:])


def _formula_product_backward(*args):
    grads = formulas.product_backward(points_of(args), *args[COUNT:])
    return tuple(t.contiguous() for t in grads)


product_backward = Op(
    "points_product_backward",
    f"({SCHEMA}, Tensor f, Tensor g, Tensor right, Tensor left) -> (Tensor grad_x, Tensor grad_y, "
    "Tensor grad_epsilon, Tensor grad_f, Tensor grad_g, Tensor grad_right, Tensor grad_left)",
    family="transport",
    fake=_fake_product_backward,
    implementations=[
        cpu("points_product_backward", dtypes=DTYPES),
        triton("transport.points_product", "points_product_backward", dtypes=FLOAT32),
        reference(_formula_product_backward),
    ],
)
register_gradient_by_reference(
    product_backward, _formula_product_backward, arguments=[0, 1, 2, *range(COUNT, COUNT + 4)]
)


def _setup_softmin(ctx, inputs, output):
    save(ctx, inputs, *inputs[COUNT:], output)


def _softmin_gradient(ctx, grad: Tensor):
    """As of −ε Q with f = the soft minima, L = their gradient and R = w."""
    args, (g, weight, result) = saved(ctx)
    f = torch.where(result.isinf(), -torch.inf, result)
    grad = torch.where(result.isinf(), 0, grad)
    right, left = weight[..., None], grad[..., None]
    of = product_backward(*args, f, g, right, left)
    grad_x, grad_y, grad_epsilon, _, grad_g, grad_weight, _ = of
    eps = args[2][:, None]
    return (
        *spread(-eps[..., None] * grad_x, -eps[..., None] * grad_y, -args[2] * grad_epsilon),
        -eps * grad_g,
        -eps * grad_weight[..., 0],
    )


register_gradient(softmin, _setup_softmin, _softmin_gradient)


def _setup_product(ctx, inputs, output):
    save(ctx, inputs, *inputs[COUNT:])


def _product_gradient(ctx, grad: Tensor):
    args, (f, g, values) = saved(ctx)
    of = product_backward(*args, f, g, values, grad)
    return (*spread(*of[:3]), *of[3:6])


register_gradient(product, _setup_product, _product_gradient)


def _fake_cost(x, y, cost):
    return x.new_empty(x.shape[0], x.shape[1], y.shape[1])


def _reference_cost(x, y, cost):
    return formulas.cost_matrix(x, y, cost).contiguous()


cost_matrix = Op(
    "points_cost",
    "(Tensor x, Tensor y, str cost) -> Tensor",
    family="transport",
    fake=_fake_cost,
    implementations=[
        cpu("points_cost", dtypes=DTYPES),
        triton("transport.points", "points_cost", dtypes=FLOAT32),
        reference(_reference_cost),
    ],
)


def _setup_cost(ctx, inputs, output):
    x, y, ctx.cost = inputs
    ctx.save_for_backward(x, y, *([output] if ctx.cost == "euclidean" else []))


def _cost_gradient(ctx, grad: Tensor):
    x, y, *rest = ctx.saved_tensors
    if ctx.cost in ("dot", "cosine"):
        return -grad @ y, -grad.mT @ x, None
    if rest:
        apart = rest[0] > 0
        grad = torch.where(apart, grad / torch.where(apart, rest[0], 1), 0)
    else:
        grad = 2 * grad
    grad_x = grad.sum(2)[..., None] * x - grad @ y
    return grad_x, grad.sum(1)[..., None] * y - grad.mT @ x, None


register_gradient(cost_matrix, _setup_cost, _cost_gradient)
