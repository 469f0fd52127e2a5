"""What every op does the same way to become ``torch.ops.weft.<name>``."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from weft import native
from weft.dispatch import Dispatcher, Implementation, pinned, use

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

registry: dict[str, "Op"] = {}  # every op, in the order of registration


class Op:
    """An op of the library: schema, fake function and implementations; callable.

    ``fake`` gives shapes and strides; ``implementations`` are tried in order, the reference last.
    Its module is where its public function, its reference and its kernels are looked for.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable,
        implementations: list[Implementation],
        family: str,
    ):
        self.name, self.family = name, family
        self.qualified_name = f"weft::{name}"
        self.dispatcher = Dispatcher(self.qualified_name, implementations)
        torch.library.define(self.qualified_name, schema)
        torch.library.register_fake(self.qualified_name, fake)
        torch.library.impl(self.qualified_name, "CompositeExplicitAutograd")(self.dispatcher)
        self.overload = getattr(torch.ops.weft, name).default
        registry[name] = self

    def __call__(self, *args):
        return self.overload(*args)


def cpu(name: str, refuses: Callable | None = None, dtypes: frozenset = FLOATS) -> Implementation:
    """The C++ kernel of this name; ``dtypes`` are those of its first argument."""
    unavailable = lambda: native.missing.get("cpu")  # noqa: E731
    return Implementation(
        "cpu", native.cpu_op(name), frozenset({"cpu"}), dtypes, unavailable, refuses
    )


def cuda(name: str, dtypes: frozenset, refuses: Callable | None = None) -> Implementation:
    """The CUDA kernel of this name."""
    unavailable = lambda: native.missing.get("cuda")  # noqa: E731
    return Implementation(
        "cuda", native.cuda_op(name), frozenset({"cuda"}), dtypes, unavailable, refuses
    )


def _triton_unavailable() -> str | None:
    from importlib.util import find_spec

    return None if find_spec("triton") else "triton is not installed"


def triton(
    module: str,
    function: str,
    refuses: Callable | None = None,
    dtypes: frozenset = FLOATS - {torch.float64},
) -> Implementation:
    """The launcher ``weft.triton_kernels.<module>.<function>``, imported when it first runs.

    ``dtypes`` are those of its first argument.
    """

    def run(*args):
        from importlib import import_module

        return getattr(import_module(f"weft.triton_kernels.{module}"), function)(*args)

    devices = frozenset({"cpu", "cuda"} if INTERPRETED else {"cuda"})
    return Implementation("triton", run, devices, dtypes, _triton_unavailable, refuses)


def reference(run: Callable) -> Implementation:
    return Implementation("reference", run)


def register_gradient(op: Op, setup: Callable, backward: Callable) -> None:
    """``torch.library.register_autograd`` where the backward runs under the pin of its forward."""

    def setup_with_pin(ctx, inputs, output):
        setup(ctx, inputs, output)
        ctx.pin = pinned()

    def backward_with_pin(ctx, *grads):
        if ctx.pin is None:
            return backward(ctx, *grads)
        with use(ctx.pin):
            return backward(ctx, *grads)

    torch.library.register_autograd(
        op.qualified_name, backward_with_pin, setup_context=setup_with_pin
    )


def register_gradient_by_reference(op: Op, formula: Callable, arguments: list[int]) -> None:
    """The gradient of ``op`` is that of ``formula``, plain PyTorch with the same arguments.

    For ops that are themselves backwards: second derivatives need no kernel. ``arguments`` are the
    positions that ``op`` is differentiable in, where a tensor is given.
    """

    def setup(ctx, inputs, output):
        is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(v for v, t in zip(inputs, is_tensor, strict=True) if t))
        ctx.is_tensor = is_tensor
        ctx.others = [None if t else v for v, t in zip(inputs, is_tensor, strict=True)]

    def backward(ctx, *grads):
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if t else v for t, v in zip(ctx.is_tensor, ctx.others, strict=True)]
        given = [position for position in arguments if ctx.is_tensor[position]]

        def of_differentiable(*values):
            full = list(inputs)
            for position, value in zip(given, values, strict=True):
                full[position] = value
            return formula(*full)

        _, vjp = torch.func.vjp(of_differentiable, *(inputs[i] for i in given))
        result = [None] * len(inputs)
        for position, grad in zip(given, vjp(grads), strict=True):
            result[position] = grad
        return tuple(result)

    register_gradient(op, setup, backward)


def register_no_gradient(op: Op, why: str) -> None:
    """Without a formula PyTorch only warns, and the gradients of C++ kernels vanish."""

    def raises(ctx, *grads):
        raise RuntimeError(f"{op.qualified_name} has no gradient: {why}")

    torch.library.register_autograd(op.qualified_name, raises)
