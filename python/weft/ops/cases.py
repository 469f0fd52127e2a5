"""The vocabulary of ``ops/<family>/cases/<op>.py``: what the contract suite and the benchmarks run.

A module of ``cases`` lists its public functions in ``CASES``; nothing else has to be told of a new
one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import weft
from weft.ops.registration import FLOATS


def randn(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> Tensor:
    """Normal numbers that depend on the seed alone, rounded once to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)


def on_device(options: dict, device: str) -> dict:
    """Options with the tensors in them, and in masks and the like, on the device."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), options)


def invoke(function: Callable, args: Sequence, keywords: tuple[str, ...], options: dict):
    """Calls the function with the last arguments by their names."""
    n = len(args) - len(keywords)
    return function(*args[:n], **dict(zip(keywords, args[n:], strict=True)), **options)


@dataclass(frozen=True)
class Sample:
    """Small inputs for correctness: ``make(dtype, device)`` gives the arguments of the function,
    the last of them those that have the names ``keywords``.

    ``constant`` are the positions of floating-point results that depend on no argument of ``make``:
    they need no gradient, all others must have one. Where a loop of launches takes the interpreter
    too long, ``interpreted`` is False: only the long leg has it there.
    """

    name: str
    make: Callable[[torch.dtype, str], tuple]
    options: dict = field(default_factory=dict)
    constant: tuple[int, ...] = ()
    keywords: tuple[str, ...] = ()
    interpreted: bool = True


@dataclass(frozen=True)
class Workload:
    """Inputs of a size that papers use, for benchmarks. ``flops`` and ``bytes`` are of the forward,
    the least that any implementation must do; ``backward_flops`` of the backward alone."""

    name: str
    make: Callable[[torch.dtype, str], tuple]
    flops: float
    bytes: Callable[[int], float]  # of the item size
    options: dict = field(default_factory=dict)
    backward_flops: float = 0.0
    quick: bool = False  # small enough for --quick and the demo
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadInput:
    """Arguments that the function must refuse with ``error``, a text matching ``match``."""

    make: Callable[[], tuple]
    error: type[Exception]
    match: str
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class OpCases:
    """All that is checked and timed of one public function.

    ``plain`` is the formula as a PyTorch user would write it, with the arguments of the function:
    the yardstick of accuracy and time. An op that is not differentiable, or not twice, says so.
    ``torch_op`` is PyTorch's own op for the same, where there is one: its errors count as plain
    PyTorch's too. It raises ``NotImplementedError`` for options that it lacks.
    ``dtypes`` are those of its first argument.
    """

    name: str
    plain: Callable
    samples: list[Sample]
    workloads: list[Workload]
    bad: list[BadInput]
    differentiable: bool = True
    transformable: bool = True  # works under torch.func
    dtypes: frozenset[torch.dtype] = FLOATS
    torch_op: Callable | None = None
    # Of a result that is an object, the tensors that are compared; ``plain`` returns those.
    result: Callable = lambda found: found  # noqa: E731

    def dtype_near(self, dtype: torch.dtype) -> torch.dtype:
        """This dtype, or one that it does take."""
        return dtype if dtype in self.dtypes else min(self.dtypes, key=str)

    @property
    def function(self) -> Callable:
        return getattr(weft, self.name)


def discover() -> Iterator[tuple[str, OpCases]]:
    """(family, cases) of every op of every family."""
    from weft import ops

    for module in iter_modules(ops.__path__):
        if module.ispkg:
            folder = import_module(f"weft.ops.{module.name}.cases")
            for one in iter_modules(folder.__path__, f"{folder.__name__}."):
                for cases in getattr(import_module(one.name), "CASES", ()):
                    yield module.name, cases
