"""One workload of one op: its inputs, its truth in float64, and the time of a provider's pass."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import weft
from weft.ops.cases import OpCases, Workload, invoke, on_device

PASSES = ("forward", "backward", "both")
MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 5, 1000


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def tensors(value) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass
class Case:
    """An op with one workload, dtype and device; its inputs are made once and copied for each call,
    so that no provider sees what another wrote."""

    family: str
    cases: OpCases
    workload: Workload
    dtype: torch.dtype
    device: str

    def __post_init__(self):
        self.args = self.workload.make(self.dtype, self.device)
        self.options = on_device(self.workload.options, self.device)

    @property
    def name(self) -> str:
        return f"{self.cases.name} {self.workload.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES if self.cases.differentiable else PASSES[:1]

    def work(self, pass_: str) -> tuple[float, float]:
        """FLOPs and bytes that any implementation needs. A backward reads what a forward does (with
        the upstream gradient in place of the result) and writes the gradients of the inputs."""
        item = self.dtype.itemsize
        forward = (self.workload.flops, self.workload.bytes(item))
        gradients = sum(a.numel() for a in self.args if is_float(a)) * item
        backward = (self.workload.backward_flops, forward[1] + gradients)
        if pass_ == "both":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if pass_ == "forward" else backward

    def fresh_args(self, requires_grad: bool, dtype: torch.dtype | None = None) -> list:
        """Copies of the inputs, with their strides."""
        return [
            a.detach().clone().to(dtype or a.dtype).requires_grad_(requires_grad)
            if is_float(a)
            else a
            for a in self.args
        ]

    def call(self, function: Callable, args: list):
        found = invoke(function, args, self.workload.keywords, self.options)
        return self.cases.result(found)

    def upstream(self, results: list[Tensor]) -> list[Tensor]:
        """The same upstream gradients for every provider and dtype."""
        generator = torch.Generator().manual_seed(7)
        return [
            torch.randn(r.shape, dtype=torch.float64, generator=generator).to(r.device, r.dtype)
            for r in results
        ]

    def evaluate(self, function: Callable, dtype: torch.dtype | None = None) -> "Values":
        """Results and gradients."""
        args = self.fresh_args(self.cases.differentiable, dtype)
        results = tensors(self.call(function, args))
        if not self.cases.differentiable:
            return Values(results, [])
        outputs = [r for r in results if r.requires_grad]
        if not outputs:
            return Values([r.detach() for r in results], None)
        leaves = [a for a in args if is_float(a)]
        grads = torch.autograd.grad(outputs, leaves, self.upstream(outputs))
        return Values([r.detach() for r in results], list(grads))

    def truth(self) -> "Values":
        """What the reference says in float64 for the values of these inputs."""
        with weft.use("reference"):
            return self.evaluate(self.cases.function, torch.float64)

    def prepare(self, function: Callable, pass_: str) -> Callable:
        """Makes fresh inputs (and, for ``backward``, runs the forward); returns what is timed."""
        if pass_ == "forward":
            args = self.fresh_args(requires_grad=False)
            return lambda: self.call(function, args)
        args = self.fresh_args(requires_grad=True)
        leaves = [a for a in args if is_float(a)]
        if not hasattr(self, "_upstream"):
            self._upstream = self.upstream(self._outputs(function, args))
        if pass_ == "backward":
            outputs = self._outputs(function, args)
            return lambda: torch.autograd.grad(outputs, leaves, self._upstream)
        return lambda: torch.autograd.grad(self._outputs(function, args), leaves, self._upstream)

    def _outputs(self, function, args) -> list[Tensor]:
        return [r for r in tensors(self.call(function, args)) if r.requires_grad]


@dataclass
class Values:
    """Results and gradients (None where a provider has none)."""

    results: list[Tensor]
    grads: list[Tensor] | None

    def errors(self, truth: "Values") -> dict[str, float | None]:
        """By pass, the largest error over the largest true value."""
        errors = {"forward": _error(self.results, truth.results), "backward": None, "both": None}
        if self.grads is not None:
            errors["backward"] = _error(self.grads, truth.grads)
            errors["both"] = max(errors["forward"], errors["backward"])
        return errors


def _error(found: list[Tensor], truth: list[Tensor]) -> float:
    if len(found) != len(truth):
        return math.inf
    worst = 0.0
    for one, two in zip(found, truth, strict=True):
        if one.shape != two.shape:
            return math.inf
        if not two.numel():
            continue
        if not two.is_floating_point():  # indices: the share that differs
            error = (one != two).double().mean()
        else:
            error = (one.double() - two).abs().max() / two.abs().max().clamp_min(1e-300)
        worst = max(worst, float(error)) if not math.isnan(error) else math.inf
    return worst


def is_wrong(error: float, plain_error: float, dtype: torch.dtype) -> bool:
    """Ten times worse than plain PyTorch and than rounding to this dtype explains."""
    plain_error = plain_error if math.isfinite(plain_error) else 0.0
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return not error <= max(10 * plain_error, 16 * rounding)


def time_interleaved(
    case: Case, functions: dict[str, Callable], pass_: str, seconds: float
) -> dict[str, list[float]]:
    """Seconds per call of each function. They take turns, one call each, on fresh inputs, for about
    ``seconds`` per function: what disturbs the machine disturbs all of them."""
    timed = _time_cuda if case.device == "cuda" else _time_cpu
    for function in functions.values():  # compiles, loads kernels, starts threads
        for _ in range(2):
            timed(case, function, pass_)
    found = {name: [] for name in functions}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for round_ in range(MAXIMUM_ROUNDS):
            order = list(functions)
            for name in order if round_ % 2 == 0 else reversed(order):
                found[name].append(timed(case, functions[name], pass_))
            spent = time.perf_counter() - start
            if round_ + 1 >= MINIMUM_ROUNDS and spent > seconds * len(functions):
                break
    finally:
        if enabled:
            gc.enable()
    return found


def _time_cpu(case: Case, function: Callable, pass_: str) -> float:
    with torch.set_grad_enabled(pass_ != "forward"):
        call = case.prepare(function, pass_)
        start = time.perf_counter()
        result = call()
        spent = time.perf_counter() - start
    del result  # freeing it is not timed
    return spent


_cache_filler: list[Tensor] = []


def _time_cuda(case: Case, function: Callable, pass_: str) -> float:
    """Time on the device. The buffer that is cleared first evicts the L2 cache, and keeps the
    device busy while the host gets ahead, so that launch latency is not counted."""
    if not _cache_filler:
        _cache_filler.append(torch.empty(1 << 28, dtype=torch.uint8, device="cuda"))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.set_grad_enabled(pass_ != "forward"):
        call = case.prepare(function, pass_)
        _cache_filler[0].zero_()
        start.record()
        result = call()
        end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3
