"""What the contract tests share: building a sample's inputs, and watching which kernels run."""

import contextlib
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

import weft
from weft.dispatch import Dispatcher
from weft.ops.cases import OpCases, Sample, discover, invoke, on_device
from weft.ops.registration import INTERPRETED

CASES = [cases for _, cases in discover()]
SAMPLES = [(cases, sample) for cases in CASES for sample in cases.samples]
DIFFERENTIABLE = [(cases, sample) for cases, sample in SAMPLES if cases.differentiable]
TRANSFORMABLE = [(cases, sample) for cases, sample in DIFFERENTIABLE if cases.transformable]


def name_of(parameter) -> str | None:
    """Test identifiers: the op's or the sample's name."""
    if isinstance(parameter, (OpCases, Sample)):
        return parameter.name
    return str(parameter).removeprefix("torch.") if isinstance(parameter, torch.dtype) else None


def first_with_its_options(cases: OpCases, sample: Sample) -> bool:
    kind = lambda s: (s.options.keys(), s.interpreted)  # noqa: E731
    return sample is next(s for s in cases.samples if kind(s) == kind(sample))


def first_sample(cases: OpCases) -> Sample:
    """The first that can run here."""
    return next(s for s in cases.samples if s.interpreted or not INTERPRETED)


def longest_dimension(sample: Sample) -> int:
    given = tensors(sample.make(torch.float32, "cpu"))
    return max((n for tensor in given for n in tensor.shape), default=0)


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
        self.upstream_dtype = self.dtype  # what upstream gradients are rounded to
        self.args = self.sample.make(self.dtype, self.device)
        self.options = on_device(self.sample.options, self.device)

    def in_dtype(self, dtype: torch.dtype) -> "Call":
        """The same call with the values of these inputs in another dtype; in float64, the truth."""
        other = Call(self.cases, self.sample, dtype, self.device)
        other.args = tuple(
            unexpanded(a).to(dtype).expand(a.shape) if _is_float(a) else a for a in self.args
        )
        other.upstream_dtype = self.upstream_dtype
        return other

    def leaves(self) -> list[Tensor]:
        """One tensor per float argument, without the expansion that gradcheck could not perturb."""
        return [unexpanded(a).detach().requires_grad_() for a in self.args if _is_float(a)]

    def with_leaves(self, leaves, function=None):
        """Calls the function with the float arguments replaced, expanded as in the sample."""
        given = iter(leaves)
        args = [next(given).expand(a.shape) if _is_float(a) else a for a in self.args]
        return self.call(function, args)

    def __call__(self, function=None):
        return self.call(function, self.args)

    def call(self, function, args):
        function = function or self.cases.function
        found = invoke(function, args, self.sample.keywords, self.options)
        return self.cases.result(found)


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
    graded = [r for r in results if r.is_floating_point()]  # indices have no gradient
    generator = torch.Generator().manual_seed(seed)
    upstream = [
        torch.randn(r.shape, dtype=torch.float64, generator=generator)
        .to(call.upstream_dtype)
        .to(r.device, r.dtype)
        for r in graded
    ]
    constant = [results[i] for i in call.sample.constant]
    pairs = [p for p in zip(graded, upstream, strict=True) if not any(p[0] is c for c in constant)]
    lost = [tuple(r.shape) for r, _ in pairs if not r.requires_grad]
    assert not lost, f"results of shapes {lost} have lost their gradient"
    graded, upstream = zip(*pairs, strict=True)
    return [r.detach() for r in results], list(torch.autograd.grad(graded, leaves, upstream))


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


def largest_error(found: Tensor, truth: Tensor) -> float:
    difference = (found.double() - truth.double()).masked_fill(found == truth, 0)  # inf - inf
    return float(difference.abs().max()) if truth.numel() else 0.0


def ulps(found: Tensor, truth: Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest error, in units of the last place of the largest truth."""
    if not truth.is_floating_point() or not truth.numel():
        return 0.0
    largest = float(torch.where(truth.isfinite(), truth, 0).abs().max())
    return largest_error(found, truth) / (torch.finfo(dtype or found.dtype).eps * largest or 1.0)


def assert_accurate(found: Tensor, truth: Tensor, plain_ulps: float, factor: float) -> None:
    """The error is at most `factor` times that of plain PyTorch, or 2 ulp of the largest truth."""
    assert found.shape == truth.shape
    if not found.is_floating_point():  # indices and counts have no rounding error
        assert torch.equal(found, truth)
    else:
        error = ulps(found, truth)
        assert error <= max(factor * plain_ulps, 2), (error, plain_ulps)


def errors_of_plain(call: Call, truth: Call, dtypes: list[torch.dtype], results: int):
    """Of plain PyTorch for each result and gradient, in ulp of the dtypes: its own error, or the
    largest of all results, or of all gradients, that plain PyTorch computes in the same dtype. The
    largest error of one small tensor is a matter of luck."""
    with weft.use("reference"):
        exact = list(itertools.chain(*values_and_gradients(truth)))
    largest = [0.0] * len(exact)
    for function in (call.cases.plain, call.cases.torch_op):
        if function is None:
            continue
        try:
            plain = list(itertools.chain(*values_and_gradients(call, function)))
        except NotImplementedError:
            continue
        errors = list(map(ulps, plain, exact, dtypes))
        for part in (slice(0, results), slice(results, None)):
            same = zip(plain[part], dtypes[part], errors[part], strict=True)
            shared = max((e for t, dtype, e in same if t.dtype == dtype and e == e), default=0.0)
            of_part = zip(largest[part], errors[part], plain[part], dtypes[part], strict=True)
            largest[part] = [
                max(before, shared if t.dtype == dtype else e) for before, e, t, dtype in of_part
            ]
    return largest


def check_accuracy(call: Call, run) -> None:
    """Results and gradients of ``call`` inside ``with run`` against float64, on poisoned memory.

    Of float64 itself there is no better truth here, which has errors of its own: plain PyTorch's
    error is then the larger of those of float32 and of float64 beside it.
    """
    exact = call.dtype == torch.float64
    truth_call = call.in_dtype(torch.float64)
    with weft.use("reference"):
        truth, truth_grads = values_and_gradients(truth_call)
    before = [a.clone() for a in tensors(call.args)]
    with run, poisoned_memory():
        found, grads = values_and_gradients(call)
    all_found, all_true = found + grads, truth + truth_grads
    dtypes = [t.dtype for t in all_found]
    of_plain = errors_of_plain(call, truth_call, dtypes, len(found))
    if exact:
        single = call.in_dtype(torch.float32)
        halves = [torch.float32 if d == torch.float64 else d for d in dtypes]
        other = errors_of_plain(single, single.in_dtype(torch.float64), halves, len(found))
        of_plain = list(map(max, of_plain, other))
    factors = [2 + exact] * len(found) + [3 + exact] * len(grads)
    for result in zip(all_found, all_true, of_plain, factors, strict=True):
        assert_accurate(*result)
    for now, then in zip(tensors(call.args), before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num()), "an input was modified"
