"""Which implementation runs, and how it is pinned."""

import pytest
import torch
from contract import watch

import weft
from weft import native
from weft.dispatch import Dispatcher, Implementation, pinned
from weft.ops.registration import registry

x, bases = torch.randn(3, 4), torch.linalg.qr(torch.randn(2, 4, 2)).Q


def test_first_without_a_reason_runs():
    run = lambda name: lambda *args: name  # noqa: E731
    dispatcher = Dispatcher(
        "weft::toy",
        [
            Implementation("cuda", run("cuda"), frozenset({"cuda"})),
            Implementation("triton", run("triton"), unavailable=lambda: "not installed"),
            Implementation(
                "cpu",
                run("cpu"),
                dtypes=frozenset({torch.float32}),
                refuses=lambda a: "needs two rows" if a.shape[0] < 2 else None,
            ),
            Implementation("reference", run("reference")),
        ],
    )
    assert dispatcher(torch.ones(2)) == "cpu"
    assert dispatcher(torch.ones(1)) == "reference"
    assert dispatcher(torch.ones(2, dtype=torch.float64)) == "reference"
    for name, reason in {
        "cuda": "runs on cuda, not on cpu",
        "triton": "not installed",
        "cpu": "needs two rows",
    }.items():
        with weft.use(name), pytest.raises(NotImplementedError, match=reason):
            dispatcher(torch.ones(1))
    with weft.use("cpu"), pytest.raises(NotImplementedError, match="takes float32, not float64"):
        dispatcher(torch.ones(2, dtype=torch.float64))


def test_every_op_ends_with_the_reference():
    for op in registry.values():
        assert op.dispatcher.implementations[-1].name == "reference"


def test_use_is_undone_and_nests():
    with weft.use("reference"):
        with weft.use(None):
            assert pinned() is None
        assert pinned() == "reference"
        with pytest.raises(KeyError), weft.use(None):
            raise KeyError
        assert pinned() == "reference"
    assert pinned() is None


def test_use_refuses_unknown_names():
    with pytest.raises(ValueError, match="name must be one of"):
        weft.use("gpu")


def test_backward_remembers_the_pin():
    leaf = bases.clone().requires_grad_()
    with watch() as log:
        with weft.use("reference"):
            out = weft.subspace_logits(x, leaf)
        out.sum().backward()
    assert [(op, name) for op, name, _ in log] == [
        ("subspace_logits", "reference"),
        ("subspace_logits_backward", "reference"),
    ]


def test_use_inside_a_compiled_function_raises():
    def function(x):
        with weft.use("reference"):
            return weft.subspace_logits(x, bases)

    with pytest.raises(Exception, match="put it around the call of the compiled function"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert pinned() is None


def test_levels():
    levels = native.supported_levels()
    assert levels and native.cpu_level == levels[-1]
    with native.use_level("generic"):
        assert native.cpu_level == "generic"
        weft.subspace_logits(x, bases)
    with pytest.raises(ValueError, match="level must be one of"), native.use_level("sse2"):
        pass
