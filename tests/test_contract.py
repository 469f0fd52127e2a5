"""What every op promises (docs/contract.md), checked for every case that the families declare."""

import functools
import inspect
import itertools

import pytest
import torch
import torch._inductor.config
from conftest import IMPLEMENTATIONS, ON_GPU, name_and_device, running, skip_unless_declared
from contract import (
    CASES,
    DIFFERENTIABLE,
    SAMPLES,
    TRANSFORMABLE,
    Call,
    check_accuracy,
    first_sample,
    name_of,
    tensors,
    unexpanded,
    values_and_gradients,
    watch,
)

from weft.ops.cases import Sample
from weft.ops.registration import INTERPRETED, registry

EVERYWHERE = IMPLEMENTATIONS + ON_GPU
COMPILED = [i for i in EVERYWHERE if not i.startswith("reference")]
ONE_OF_EACH_KIND = [*dict.fromkeys([IMPLEMENTATIONS[0], IMPLEMENTATIONS[-1], *ON_GPU])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def of_dtypes(cases, dtypes=DTYPES) -> list[torch.dtype]:
    """Those that the op takes; of one that takes no floats, any, as it means nothing."""
    return [dtype for dtype in dtypes if dtype in cases.dtypes] or [torch.float32]


OF_DTYPES = [(cases, sample, dtype) for cases, sample in SAMPLES for dtype in of_dtypes(cases)]
DEVICES = sorted({name_and_device(implementation)[1] for implementation in EVERYWHERE})


def call_for(implementation: str, cases, sample: Sample, dtype: torch.dtype) -> Call:
    """The call on the implementation's device; skips if the op declares no such implementation."""
    skip_unless_declared(cases, implementation, dtype)
    return Call(cases, sample, dtype, name_and_device(implementation)[1])


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("cases, sample, dtype", OF_DTYPES, ids=name_of)
def test_accuracy(cases, sample, implementation, dtype):
    call = call_for(implementation, cases, sample, dtype)
    check_accuracy(call, running(implementation))


@pytest.mark.parametrize("implementation", ONE_OF_EACH_KIND)
@pytest.mark.parametrize("cases, sample", DIFFERENTIABLE, ids=name_of)
def test_gradcheck(cases, sample, implementation, pytestconfig):
    """Element by element, or along random directions (fast_mode) where there are many, and of the
    second derivative in the short leg: by elements it takes most of the time of all tests."""
    call = call_for(implementation, cases, sample, torch.float64)
    large = sum(t.numel() for t in call.leaves()) > 200
    short = not pytestconfig.getoption("--slow")

    def function(*leaves):
        return finite(call.with_leaves(leaves))

    with running(implementation):
        assert torch.autograd.gradcheck(function, call.leaves(), fast_mode=large)
        assert torch.autograd.gradgradcheck(function, call.leaves(), fast_mode=large or short)


def finite(results) -> list[torch.Tensor]:
    """Without infinities, which mark what is not there: of them there are no differences.

    And without indices and counts: gradcheck takes results that have no gradient to come last."""
    floats = [r for r in tensors(results) if r.is_floating_point()]
    return [torch.where(r.isfinite(), r, 0) for r in floats]


def as_leaf(value, requires_grad: bool):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_(requires_grad)
    return value


@functools.cache
def kinds_by_sample(name: str) -> dict[str, set]:
    """Of the samples of these cases, the kinds of calls of ops that no earlier one makes."""
    cases = next(c for c in CASES if c.name == name)
    seen, first = set(), {}
    for sample in cases.samples:
        with watch() as log:
            values_and_gradients(Call(cases, sample, torch.float32))
        kinds = {kind_of(op, args) for op, _, args in log}
        first[sample.name] = kinds - seen
        seen |= kinds
    return first


def kind_of(op: str, args: tuple) -> tuple:
    """The op, with which of its arguments are given."""
    return op, *(a is None for a in args)


@pytest.mark.parametrize("implementation", ONE_OF_EACH_KIND)
@pytest.mark.parametrize("cases, sample", SAMPLES, ids=name_of)
def test_opcheck(cases, sample, implementation):
    """PyTorch's own checks of schema, fake function, autograd and dynamic shapes, for every op that
    the call runs, with the arguments it passes.

    Those of autograd and dynamic shapes take seconds each and never look at values, nor at what is
    inside an op: they run once for each kind of call, on one implementation, and of a backward they
    look at the first derivative alone, as PyTorch's compiler does."""
    call = call_for(implementation, cases, sample, torch.float32)
    whole = set()
    if implementation == IMPLEMENTATIONS[-1] and not INTERPRETED:
        whole = set(kinds_by_sample(cases.name)[sample.name])
    with running(implementation):
        with watch() as log:
            values_and_gradients(call)
        assert log or not implementation.startswith("cpu")
        # An iteration calls one op many times with arguments of one kind: once is enough.
        calls = {
            (op, *(a.shape if isinstance(a, torch.Tensor) else str(a) for a in args)): (op, args)
            for op, _, args in log
        }
        for op, args in calls.values():
            some = {"test_utils": ("test_schema", "test_faketensor")}
            if kind_of(op, args) in whole:
                whole.remove(kind_of(op, args))
                some = {}
            graded = cases.differentiable and "backward" not in op
            args = [as_leaf(a, graded) for a in args]
            torch.library.opcheck(registry[op].overload, args, **some)
    assert not whole, f"seen before, and not now: {whole}"


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_runs_what_is_pinned(cases, implementation):
    """Forward and backward, eager and compiled."""
    call = call_for(implementation, cases, first_sample(cases), torch.float32)
    name, _ = name_and_device(implementation)
    compiled = torch.compile(cases.function, fullgraph=True, backend="aot_eager")
    for function in (cases.function, compiled):
        with running(implementation), watch() as log:
            values_and_gradients(call, function)
        assert log and all(chosen == name for _, chosen, _ in log)
        assert any(op.endswith("_backward") for op, _, _ in log) == cases.differentiable


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_default_is_the_first_that_can_run(cases, device):
    names = {n for n, on in map(name_and_device, EVERYWHERE) if on == device}
    with watch() as log:
        values_and_gradients(Call(cases, cases.samples[0], torch.float32, device))
    for op, chosen, _ in log:
        known = registry[op].dispatcher.implementations
        expected = [k for k in known if k.name in names and device in (k.devices or {device})]
        assert chosen == expected[0].name


@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_compile_with_dynamic_shapes(cases):
    """One graph without breaks serves every sample size; results are those of the eager call."""
    torch._dynamo.reset()
    plain_samples = [s for s in cases.samples if s.options == cases.samples[0].options]
    compiled = torch.compile(
        lambda *a, **o: cases.result(cases.function(*a, **o)),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for sample in plain_samples:
        call = Call(cases, sample, torch.float32)
        for one, two in zip(
            itertools.chain(*values_and_gradients(call, compiled)),
            itertools.chain(*values_and_gradients(call)),
            strict=True,
        ):
            assert torch.equal(one, two) and strides_that_count(one) == strides_that_count(two)


def strides_that_count(t: torch.Tensor) -> list[int]:
    """Without those of dimensions of one element, which lead nowhere."""
    return [stride for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1]


@torch._inductor.config.patch(force_disable_caches=True)  # they outlive a change of a fake function
@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_compile_with_inductor(cases):
    torch._dynamo.reset()
    call = Call(cases, cases.samples[0], torch.float32)
    compiled = torch.compile(cases.function, fullgraph=True)
    for one, two in zip(
        itertools.chain(*values_and_gradients(call, compiled)),
        itertools.chain(*values_and_gradients(call)),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("cases, sample", TRANSFORMABLE, ids=name_of)
def test_torch_func(cases, sample):
    """jvp, grad and vmap agree with plain autograd; forward-mode AD is not silently zero."""
    call = Call(cases, sample, torch.float64)
    leaves = [t.detach() for t in call.leaves()]

    def loss(*values):
        return sum(r.sin().sum() for r in finite(call.with_leaves(values)))

    expected = torch.autograd.grad(loss(*call_leaves(leaves)), call_leaves.last)
    found = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
    directions = [torch.ones_like(t) for t in leaves]
    _, tangent = torch.func.jvp(loss, tuple(leaves), tuple(directions))
    along = sum((g * d).nansum() for g, d in zip(expected, directions, strict=True))
    torch.testing.assert_close(tangent.nan_to_num(), along.nan_to_num())
    stacked = [torch.stack([t, 2 * t]) for t in leaves]
    batched = torch.vmap(lambda *v: tensors(call.with_leaves(v))[0])(*stacked)
    for index, scale in enumerate((1, 2)):
        single = tensors(call.with_leaves([scale * t for t in leaves]))[0]
        torch.testing.assert_close(batched[index], single)


def call_leaves(leaves):
    """Fresh leaves that require gradients, remembered as ``call_leaves.last``."""
    call_leaves.last = [t.clone().requires_grad_() for t in leaves]
    return call_leaves.last


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize(
    "cases, dtype",
    [(c, d) for c in CASES for d in of_dtypes(c, [torch.float32, torch.bfloat16])],
    ids=name_of,
)
def test_repeats_bit_for_bit(cases, implementation, dtype):
    """The same bits for any number of runs and of threads, at a size that has many tasks."""
    workload = cases.workloads[0]
    sample = Sample(workload.name, workload.make, workload.options, keywords=workload.keywords)
    call = call_for(implementation, cases, first_sample(cases) if INTERPRETED else sample, dtype)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 4, 2):
            torch.set_num_threads(count)
            with running(implementation):
                runs.append(list(itertools.chain(*values_and_gradients(call))))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("cases, sample", SAMPLES, ids=name_of)
def test_canaries(cases, sample, implementation):
    """Inputs inside buffers of NaN: nothing around them is read into a result or written."""
    call = call_for(implementation, cases, sample, torch.float32)
    with running(implementation):
        expected = list(itertools.chain(*values_and_gradients(call)))
        buffers = []

        def surround(tensor):
            if not isinstance(tensor, torch.Tensor) or not tensor.numel():
                return tensor
            if tensor.dtype == torch.bool:
                return tensor
            wrong = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            buffer = tensor.new_full((reach + 129,), wrong)
            inside = buffer.as_strided(tensor.shape, tensor.stride(), 64)
            unexpanded(inside).copy_(unexpanded(tensor))
            buffers.append((buffer, buffer.clone()))
            return inside

        call.args = tuple(surround(a) for a in call.args)
        found = list(itertools.chain(*values_and_gradients(call)))
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    for buffer, before in buffers:
        assert torch.equal(buffer.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    "cases, bad", [(c, b) for c in CASES for b in c.bad], ids=lambda p: getattr(p, "match", None)
)
def test_bad_input(cases, bad):
    with pytest.raises(bad.error, match=bad.match):
        cases.function(*bad.make(), **bad.options)


@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_signature_of_plain(cases):
    """The yardstick takes the arguments of the function."""
    of_function, of_plain = (inspect.signature(f) for f in (cases.function, cases.plain))
    assert list(of_function.parameters) == list(of_plain.parameters)


@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_docstring(cases):
    text = inspect.getdoc(cases.function)
    for part in ("Args:", "Returns:", "Raises:", "Source:"):
        assert part in text
