"""Loads the native libraries that this machine can run, and remembers why the others were not.

``weft/_cpu_<level>.so`` exists once per instruction-set level; the best one that the processor
runs is loaded. ``WEFT_CPU_ISA=avx2`` in the environment forces one, for tests.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).parent
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")

cpu_level: str | None = None  # of the CPU library in use
has_cuda = False
missing: dict[str, str] = {}  # "cpu" or "cuda" -> why it is not there
_ops: dict[tuple[str, str], Callable] = {}


def _build_error() -> str | None:
    note = HERE / "_build_error.txt"
    return note.read_text().strip() if note.exists() else None


def supported_levels() -> tuple[str, ...]:
    """The levels that were built and that this processor runs, from the plainest to the best."""
    try:
        from weft import _host
    except ImportError:
        return ()
    runs = LEVELS[: LEVELS.index(_host.cpu_level()) + 1]
    return tuple(level for level in runs if (HERE / f"_cpu_{level}.so").exists())


def _load_cpu() -> None:
    global cpu_level
    levels = supported_levels()
    if not levels:
        missing["cpu"] = _build_error() or "the native libraries were not built"
        return
    level = os.environ.get("WEFT_CPU_ISA", levels[-1])
    if level not in levels:
        raise RuntimeError(f"WEFT_CPU_ISA={level}, but built and supported here: {levels}")
    try:
        torch.ops.load_library(HERE / f"_cpu_{level}.so")
        cpu_level = level
    except OSError as error:
        missing["cpu"] = f"{error} ({error.__cause__})"


def _load_cuda() -> None:
    global has_cuda
    path = HERE / "_cuda.so"
    if not path.exists():
        missing["cuda"] = _build_error() or "not built: nvcc was not found"
    elif torch.version.cuda is None:
        missing["cuda"] = "this torch is a CPU build"
    else:
        try:
            torch.ops.load_library(path)
            has_cuda = True
        except OSError as error:
            missing["cuda"] = f"{error} ({error.__cause__})"


def cpu_op(name: str) -> Callable:
    """The C++ kernel ``name`` of the level in use, looked up when it is called."""

    def run(*args):
        op = _ops.get((cpu_level, name))
        if op is None:
            namespace = getattr(torch.ops, f"weft_cpu_{cpu_level}")
            op = _ops[cpu_level, name] = getattr(namespace, name).default
        return op(*args)

    return run


def cuda_op(name: str) -> Callable:
    """The CUDA kernel ``name``, looked up when it is called."""
    return lambda *args: getattr(torch.ops.weft_cuda, name).default(*args)


@contextmanager
def use_level(level: str):
    """Runs another instruction-set level of the CPU kernels, for tests and benchmarks."""
    global cpu_level
    if level not in supported_levels():
        raise ValueError(f"level must be one of {supported_levels()}, got {level!r}")
    torch.ops.load_library(HERE / f"_cpu_{level}.so")
    before, cpu_level = cpu_level, level
    try:
        yield
    finally:
        cpu_level = before


_load_cpu()
_load_cuda()
if (_error := _build_error()) is not None:  # pip hides what a successful build prints
    warnings.warn(_error, RuntimeWarning, stacklevel=2)
