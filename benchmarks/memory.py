"""Peak extra memory of a call: what it needs beyond its inputs, with its results and gradients.

On CUDA: the high-water mark of torch's allocator above what was allocated before.

On a CPU: the high-water mark of the *resident pages* of a fresh process above those before the
call. That counts memory whoever asked for it, and buffers that a library keeps after its first
call (ours does, per thread), which a count of torch's allocations would miss. What every process
pays once whatever the size (code, threads, compilation) is kept out by a first call with tiny
inputs, or, for ``torch.compile``, with the same inputs. Resolution: about a megabyte. Linux only.
"""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from weft.benchmarks.measure import Case
from weft.benchmarks.providers import providers_of
from weft.ops.cases import OpCases, Workload, discover


def peak_extra(case: Case, provider: str, function) -> dict[str, float]:
    """Bytes by pass; empty where this system cannot tell."""
    if case.device == "cuda":
        return {pass_: _peak_cuda(case, function, pass_) for pass_ in case.passes}
    index = case.cases.workloads.index(case.workload)
    dtype = str(case.dtype).removeprefix("torch.")
    which = [
        case.family,
        case.cases.name,
        str(index),
        dtype,
        provider,
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(
        [sys.executable, "-m", __name__, *which], capture_output=True, text=True, timeout=600
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def _peak_cuda(case: Case, function, pass_: str) -> float:
    with torch.set_grad_enabled(pass_ != "forward"):
        call = case.prepare(function, pass_)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _resident(key: str) -> int:
    """VmRSS (now) or VmHWM (the highest since it was reset), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def _return_free_pages() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library that is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _peak_here(case: Case, function, pass_: str, baseline: int | None) -> tuple[int, int]:
    """(peak above the baseline, baseline); the baseline is that of the first pass, so that what the
    library kept from it is not forgotten in the next."""
    with torch.set_grad_enabled(pass_ != "forward"):
        call = case.prepare(function, pass_)
        _return_free_pages()
        before = _resident("VmRSS")
        baseline = before if baseline is None else min(baseline, before)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        result = call()
        peak = _resident("VmHWM")
    del result
    return peak - baseline, baseline


def _tiny(case: Case) -> Case:
    """The op's first sample, which runs the same code at a size that takes no memory."""
    sample = case.cases.samples[0]
    workload = Workload(
        sample.name,
        sample.make,
        0,
        lambda _: 0,
        sample.options,
        keywords=sample.keywords,
    )
    return Case(case.family, case.cases, workload, case.dtype, case.device)


def _main(family: str, op: str, workload: str, dtype: str, provider: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    cases: OpCases = next(c for f, c in discover() if (f, c.name) == (family, op))
    case = Case(family, cases, cases.workloads[int(workload)], getattr(torch, dtype), "cpu")
    function = next(p.function for p in providers_of(family, cases) if p.name == provider)
    first = case if provider == "compile" else _tiny(case)
    found, baseline = {}, None
    for pass_ in case.passes:
        with torch.set_grad_enabled(pass_ != "forward"):
            first.prepare(function, pass_)()
    for pass_ in case.passes:
        found[pass_], baseline = _peak_here(case, function, pass_, baseline)
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
