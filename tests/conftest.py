"""Shared by all tests: the implementations that run here, and inputs surrounded by canaries."""

import contextlib
import inspect
import os
import sys

# PyTorch refuses cuBLAS in its deterministic mode, which tests use to poison memory, without this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Test processes share the cores: a thread that waits for others of its own must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import weft
from weft import native
from weft.ops.registration import INTERPRETED, registry

torch.set_num_threads(2)

# "cpu:avx2" is the C++ kernel of that instruction-set level; "triton@cuda" runs on that device.
IMPLEMENTATIONS = ["reference", *(f"cpu:{level}" for level in native.supported_levels())]
ON_GPU = []
if INTERPRETED:
    IMPLEMENTATIONS = ["triton"]
elif torch.cuda.is_available():
    ON_GPU = ["reference@cuda", "triton@cuda", *["cuda@cuda"] * native.has_cuda]


def name_and_device(implementation: str) -> tuple[str, str]:
    """What ``weft.use`` pins, and where the inputs are."""
    name, _, device = implementation.partition("@")
    return name.partition(":")[0], device or "cpu"


@contextlib.contextmanager
def running(implementation: str):
    """Pins an implementation, with its instruction-set level."""
    level = implementation.partition(":")[2]
    name, _ = name_and_device(implementation)
    with weft.use(name), native.use_level(level) if level else contextlib.nullcontext():
        yield


def undeclared(cases, implementation: str, dtype: torch.dtype) -> str | None:
    """One of the ops of the cases' module that says that it has no such implementation. A module
    without ops calls the ops whose public functions it imports."""
    name, device = name_and_device(implementation)
    dtype = cases.dtype_near(dtype)
    module_of = lambda op: op.dispatcher.implementations[-1].run.__module__  # noqa: E731
    module = cases.function.__module__
    ops = [op for op in registry.values() if module_of(op) == module]
    if not ops:
        imported = vars(sys.modules[module]).values()
        modules = {value.__module__ for value in imported if inspect.isfunction(value)}
        ops = [op for op in registry.values() if module_of(op) in modules]
    for op in ops:
        if not any(
            known.name == name
            and (known.devices is None or device in known.devices)
            and (known.dtypes is None or dtype in known.dtypes)
            for known in op.dispatcher.implementations
        ):
            return f"{op.name} declares no {name} for {device} and {dtype}"
    return None


def skip_unless_declared(cases, implementation: str, dtype: torch.dtype) -> None:
    if (why := undeclared(cases, implementation, dtype)) is not None:
        pytest.skip(why)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests marked slow")


def pytest_collection_modifyitems(config, items):
    slow_too = config.getoption("--slow")
    if INTERPRETED:
        kept = [item for item in items if _is_for_the_interpreter(item, slow_too)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    if not slow_too:
        slow = pytest.mark.skip(reason="long leg: make test-all")
        for item in items:
            if "slow" in item.keywords or _is_of_a_middle_level(item):
                item.add_marker(slow)


def _is_of_a_middle_level(item) -> bool:
    """Above AVX2 the levels differ by the width of a vector and by matrix products in bfloat16: the
    best one stands for those between."""
    callspec = getattr(item, "callspec", None)
    level = str(callspec.params.get("implementation", "")).partition(":")[2] if callspec else ""
    return level in native.LEVELS[2:] and level != native.supported_levels()[-1]


def _is_for_the_interpreter(item, slow_too: bool) -> bool:
    """What a Triton kernel takes part in, at sizes that an interpreter can run: the contract and
    the kernels' own tests."""
    of_kernels = {"implementation", "interpreted"} & set(item.fixturenames)
    of_contract = item.path.name == "test_contract.py"
    if not (of_kernels and (of_contract or item.path.parent.name == "triton_ops")):
        return False
    return slow_too or _is_in_the_short_leg(item, of_contract)


def _is_in_the_short_leg(item, of_contract: bool) -> bool:
    """An interpreted kernel takes a second: float32 is for small tiles, where loops run several
    times, bfloat16 for those of a launch (float16 differs from it by its rounding alone), and
    opcheck, which looks at shapes and strides, for one sample of each set of options. Samples of
    many launches say that they are not for it; those of a thousand rows are for tasks of the C++
    kernels: here small tiles are many."""
    from contract import first_with_its_options, longest_dimension

    params = item.callspec.params if hasattr(item, "callspec") else {}
    dtype, cases = params.get("dtype"), params.get("cases")
    if "sample" in params and not params["sample"].interpreted:
        return False
    if item.originalname == "test_opcheck":
        return first_with_its_options(cases, params["sample"])
    if cases is None:
        return dtype != torch.float16
    if "sample" in params and longest_dimension(params["sample"]) > 1000:
        return False
    if of_contract:
        kept, left_out = torch.bfloat16, torch.float32
    else:
        kept, left_out = torch.float32, torch.bfloat16
    other_is_kept = dtype == left_out and undeclared(cases, "triton", kept) is None
    return dtype != torch.float16 and not other_is_kept
