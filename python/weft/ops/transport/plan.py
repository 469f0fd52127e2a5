"""What potentials of a cost matrix stand for: the plan, and the value of the dual objective."""

from torch import Tensor

from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.ops.transport.problem import (
    COUNT,
    DIFFERENTIABLE,
    GRADIENTS,
    SCHEMA,
    fake_gradients,
    filled,
    problem_of,
    spread,
)
from weft.reference.transport import dense, gradients


def _fake_plan(*args):
    return args[0].new_empty(args[0].shape[0], args[1].shape[1], args[2].shape[1])


def _reference_plan(*args):
    p = problem_of(args)
    return dense.plan(p, *args[COUNT:]).to(p.cost.dtype).contiguous()


def _fake_plan_backward(*args):
    f, g = args[COUNT : COUNT + 2]
    return *fake_gradients(args), f.new_empty(f.shape), g.new_empty(g.shape)


def _formula_plan_backward(*args):
    f, g, grad, log = args[COUNT:]
    grads = gradients.plan_backward(grad.to(args[1].dtype), problem_of(args), f, g, log)
    return filled(grads, args)


plan = Op(
    "transport_plan",
    f"({SCHEMA}, Tensor f, Tensor g, bool log) -> Tensor",
    family="transport",
    fake=_fake_plan,
    implementations=[
        cpu("transport_plan"),
        triton("transport.plan", "transport_plan"),
        reference(_reference_plan),
    ],
)
plan_backward = Op(
    "transport_plan_backward",
    f"({SCHEMA}, Tensor f, Tensor g, Tensor grad, bool log) -> "
    f"({GRADIENTS}, Tensor grad_f, Tensor grad_g)",
    family="transport",
    fake=_fake_plan_backward,
    implementations=[
        cpu("transport_plan_backward"),
        triton("transport.plan", "transport_plan_backward"),
        reference(_formula_plan_backward),
    ],
)


def _setup_plan(ctx, inputs, output):
    ctx.save_for_backward(*inputs[: COUNT - 1], *inputs[COUNT : COUNT + 2])
    ctx.similarity, ctx.log = inputs[COUNT - 1], inputs[-1]


def _plan_gradient(ctx, grad):
    *tensors, f, g = ctx.saved_tensors
    args = (*tensors, ctx.similarity)
    *grads, grad_f, grad_g = plan_backward(*args, f, g, grad, ctx.log)
    return spread(grads, args, (grad_f, grad_g, None))


register_gradient(plan, _setup_plan, _plan_gradient)
register_gradient_by_reference(
    plan_backward, _formula_plan_backward, arguments=[*DIFFERENTIABLE, COUNT, COUNT + 1, COUNT + 2]
)


def _fake_value(*args):
    return args[1].new_empty(args[1].shape[0])


def _reference_value(*args):
    return dense.value(problem_of(args), *args[COUNT:])


def _fake_value_backward(*args):
    return fake_gradients(args)


def _formula_value_backward(*args):
    f, g, grad, rho_a, rho_b = args[COUNT:]
    return filled(gradients.value_backward(grad, problem_of(args), f, g, rho_a, rho_b), args)


value = Op(
    "transport_value",
    f"({SCHEMA}, Tensor f, Tensor g, float rho_a, float rho_b) -> Tensor",
    family="transport",
    fake=_fake_value,
    implementations=[
        cpu("transport_value"),
        triton("transport.plan", "transport_value"),
        reference(_reference_value),
    ],
)
value_backward = Op(
    "transport_value_backward",
    f"({SCHEMA}, Tensor f, Tensor g, Tensor grad, float rho_a, float rho_b) -> ({GRADIENTS})",
    family="transport",
    fake=_fake_value_backward,
    implementations=[
        cpu("transport_value_backward"),
        triton("transport.plan", "transport_value_backward"),
        reference(_formula_value_backward),
    ],
)


def _setup_value(ctx, inputs, output):
    ctx.save_for_backward(*inputs[: COUNT - 1], *inputs[COUNT : COUNT + 2])
    ctx.similarity, ctx.rho = inputs[COUNT - 1], inputs[-2:]


def _value_gradient(ctx, grad: Tensor):
    """The potentials maximise the dual objective: its derivative in them is 0."""
    *tensors, f, g = ctx.saved_tensors
    args = (*tensors, ctx.similarity)
    return spread(value_backward(*args, f, g, grad, *ctx.rho), args, (None,) * 4)


register_gradient(value, _setup_value, _value_gradient)
register_gradient_by_reference(
    value_backward,
    _formula_value_backward,
    arguments=[*DIFFERENTIABLE, COUNT, COUNT + 1, COUNT + 2],
)
