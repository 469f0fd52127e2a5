"""What every op promises (docs/contract.md), checked for every case that the families declare."""

import inspect
import itertools

import pytest
import torch
import torch._inductor.config
from contract import (
    CASES,
    DIFFERENTIABLE,
    SAMPLES,
    TRANSFORMABLE,
    Call,
    name_of,
    poisoned_memory,
    tensors,
    unexpanded,
    values_and_gradients,
    watch,
)

import weft
from conftest import IMPLEMENTATIONS, running
from weft.ops.cases import Sample
from weft.ops.registration import registry

COMPILED = [i for i in IMPLEMENTATIONS if i != "reference"]
BEST = IMPLEMENTATIONS[-1]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def assert_accurate(found, plain, truth, factor):
    """The error is at most `factor` times that of plain PyTorch, or 2 ulp of the largest truth."""
    assert found.shape == truth.shape
    if not truth.numel():
        return
    error = (found.double() - truth).abs().max()
    plain_error = (plain.double() - truth).abs().max()
    ulp = torch.finfo(found.dtype).eps * truth.abs().max()
    assert error <= max(factor * plain_error, 2 * ulp), (error, plain_error, ulp)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cases, sample", SAMPLES, ids=name_of)
def test_accuracy(cases, sample, implementation, dtype):
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels take no float64")
    call = Call(cases, sample, dtype)
    with weft.use("reference"):
        truth, truth_grads = values_and_gradients(call.in_float64())
    plain, plain_grads = values_and_gradients(call, cases.plain)
    before = [a.clone() for a in tensors(call.args)]
    with running(implementation), poisoned_memory():
        found, grads = values_and_gradients(call)
    for result in zip(found, plain, truth, strict=True):
        assert_accurate(*result, factor=2)
    for gradient in zip(grads, plain_grads, truth_grads, strict=True):
        assert_accurate(*gradient, factor=3)
    for now, then in zip(tensors(call.args), before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num()), "an input was modified"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cases, sample", DIFFERENTIABLE, ids=name_of)
def test_gradcheck(cases, sample, implementation):
    if implementation == "triton":
        pytest.skip("the Triton kernels take no float64")
    call = Call(cases, sample, torch.float64)
    large = sum(t.numel() for t in call.leaves()) > 200  # then along random directions
    with running(implementation):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda *t: call.with_leaves(t), call.leaves(), fast_mode=large)


@pytest.mark.parametrize("implementation", sorted({IMPLEMENTATIONS[0], BEST}))
@pytest.mark.parametrize("cases, sample", SAMPLES, ids=name_of)
def test_opcheck(cases, sample, implementation):
    """PyTorch's own checks of schema, fake function, autograd and dynamic shapes, for every op that
    the call runs, with the arguments it passes."""
    call = Call(cases, sample, torch.float32)
    with running(implementation):
        with watch() as log:
            values_and_gradients(call)
        assert log or not implementation.startswith("cpu")
        for op, _, args in log:
            args = [
                a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
                else a
                for a in args
            ]  # fmt: skip
            torch.library.opcheck(registry[op].overload, args)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_runs_what_is_pinned(cases, implementation):
    """Forward and backward, eager and compiled."""
    call = Call(cases, cases.samples[0], torch.float32)
    name = implementation.partition(":")[0]
    compiled = torch.compile(cases.function, fullgraph=True, backend="aot_eager")
    for function in (cases.function, compiled):
        with running(implementation), watch() as log:
            values_and_gradients(call, function)
        assert log and all(chosen == name for _, chosen, _ in log)
        assert any(op.endswith("_backward") for op, _, _ in log) == cases.differentiable


@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_default_is_the_first_that_can_run(cases):
    with watch() as log:
        values_and_gradients(Call(cases, cases.samples[0], torch.float32))
    assert all(chosen == BEST.partition(":")[0] for _, chosen, _ in log)


@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_compile_with_dynamic_shapes(cases):
    """One graph without breaks serves every sample size; results are those of the eager call."""
    torch._dynamo.reset()
    plain_samples = [s for s in cases.samples if s.options == cases.samples[0].options]
    compiled = torch.compile(
        lambda *a, **o: cases.function(*a, **o), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for sample in plain_samples:
        call = Call(cases, sample, torch.float32)
        for one, two in zip(
            itertools.chain(*values_and_gradients(call, compiled)),
            itertools.chain(*values_and_gradients(call)),
            strict=True,
        ):
            assert torch.equal(one, two) and one.stride() == two.stride()


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
        return sum(r.sin().sum() for r in tensors(call.with_leaves(values)))

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("cases", CASES, ids=name_of)
def test_repeats_bit_for_bit(cases, implementation, dtype):
    """The same bits for any number of runs and of threads, at a size that has many tasks."""
    workload = cases.workloads[0]
    call = Call(cases, Sample(workload.name, workload.make, workload.options), dtype)
    if implementation == "triton":
        call = Call(cases, cases.samples[0], dtype)
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cases, sample", SAMPLES, ids=name_of)
def test_canaries(cases, sample, implementation):
    """Inputs inside buffers of NaN: nothing around them is read into a result or written."""
    call = Call(cases, sample, torch.float32)
    with running(implementation):
        expected = list(itertools.chain(*values_and_gradients(call)))
        buffers = []

        def surround(tensor):
            if not tensor.numel() or not tensor.is_floating_point():
                return tensor
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            buffer = tensor.new_full((reach + 129,), torch.nan)
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
