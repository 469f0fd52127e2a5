"""What the contract tests share: building a sample's inputs, and watching which kernels run."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

import weft
from weft.dispatch import Dispatcher
from weft.ops.cases import OpCases, Sample, discover

CASES = [cases for _, cases in discover()]
SAMPLES = [(cases, sample) for cases in CASES for sample in cases.samples]
DIFFERENTIABLE = [(cases, sample) for cases, sample in SAMPLES if cases.differentiable]
TRANSFORMABLE = [(cases, sample) for cases, sample in DIFFERENTIABLE if cases.transformable]


def name_of(parameter) -> str | None:
    """Test identifiers: the op's or the sample's name."""
    if isinstance(parameter, (OpCases, Sample)):
        return parameter.name
    return str(parameter).removeprefix("torch.") if isinstance(parameter, torch.dtype) else None


def tensors(value) -> list[Tensor]:
    """The tensors of an op's result."""
    return [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]


@dataclass
class Call:
    """One call of a public function with the inputs of a sample."""

    cases: OpCases
    sample: Sample
    dtype: torch.dtype
    device: str = "cpu"

    def __post_init__(self):
        self.args = self.sample.make(self.dtype, self.device)
        self.options = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in self.sample.options.items()
        }

    def in_float64(self) -> "Call":
        """The same call with the values of these inputs in float64: where truth comes from."""
        exact = Call(self.cases, self.sample, torch.float64, self.device)
        exact.args = tuple(
            unexpanded(a).double().expand(a.shape) if _is_float(a) else a for a in self.args
        )
        return exact

    def leaves(self) -> list[Tensor]:
        """One tensor per float argument, without the expansion that gradcheck could not perturb."""
        return [unexpanded(a).detach().requires_grad_() for a in self.args if _is_float(a)]

    def with_leaves(self, leaves, function=None):
        """Calls the function with the float arguments replaced, expanded as in the sample."""
        given = iter(leaves)
        args = [next(given).expand(a.shape) if _is_float(a) else a for a in self.args]
        return (function or self.cases.function)(*args, **self.options)

    def __call__(self, function=None):
        return (function or self.cases.function)(*self.args, **self.options)


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def unexpanded(tensor: Tensor) -> Tensor:
    """The tensor with one element where a dimension is broadcast."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def values_and_gradients(call: Call, function=None, seed: int = 7):
    """Results and gradients for a fixed upstream gradient that does not depend on the dtype."""
    leaves = call.leaves() if call.cases.differentiable else []
    results = tensors(call.with_leaves(leaves, function) if leaves else call(function))
    if not leaves:
        return results, []
    generator = torch.Generator().manual_seed(seed)
    upstream = [
        torch.randn(r.shape, dtype=torch.float64, generator=generator).to(r.device, r.dtype)
        for r in results
    ]
    return [r.detach() for r in results], list(torch.autograd.grad(results, leaves, upstream))


@contextlib.contextmanager
def watch():
    """The list of (op, implementation, arguments) that run inside the block."""
    log, choose = [], Dispatcher.choose

    def watched(self, *args):
        chosen = choose(self, *args)
        log.append((self.op.removeprefix("weft::"), chosen.name, args))
        return chosen

    Dispatcher.choose = watched
    try:
        yield log
    finally:
        Dispatcher.choose = choose


@contextlib.contextmanager
def poisoned_memory():
    """torch.empty is filled with NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_accurate(found, plain, truth, factor):
    """The error is at most `factor` times that of plain PyTorch, or 2 ulp of the largest truth."""
    assert found.shape == truth.shape
    if not truth.numel():
        return
    error = (found.double() - truth).abs().max()
    plain_error = (plain.double() - truth).abs().max()
    ulp = torch.finfo(found.dtype).eps * truth.abs().max()
    assert error <= max(factor * plain_error, 2 * ulp), (error, plain_error, ulp)


def check_accuracy(call: Call, run) -> None:
    """Results and gradients of ``call`` inside ``with run`` against float64, on poisoned memory."""
    with weft.use("reference"):
        truth, truth_grads = values_and_gradients(call.in_float64())
    plain, plain_grads = values_and_gradients(call, call.cases.plain)
    before = [a.clone() for a in tensors(call.args)]
    with run, poisoned_memory():
        found, grads = values_and_gradients(call)
    for result in zip(found, plain, truth, strict=True):
        assert_accurate(*result, factor=2)
    for gradient in zip(grads, plain_grads, truth_grads, strict=True):
        assert_accurate(*gradient, factor=3)
    for now, then in zip(tensors(call.args), before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num()), "an input was modified"
