"""This machine: what it is called, and how fast it is at best (copies, matrix products per dtype).

The limits are measured before anything is timed, in the same process, so that a fraction of them
compares like with like: the same number of threads, the same neighbours, the same clock.
"""

import datetime
import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import weft
from weft import native


def processor() -> str:
    """The name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def describe(device: str) -> dict:
    """Device, versions and date, as every result file has them."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "type": device,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "instruction_set": native.cpu_level,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed_version("triton"),
        "weft": installed_version(weft.__name__),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class Limits:
    """The best this machine did: bytes/s of a copy (read and written), FLOP/s of a product."""

    bandwidth: float
    rates: dict[torch.dtype, float]

    def seconds(self, flops: float, size: float, dtype: torch.dtype) -> float:
        """The least time for this much work: the roofline."""
        arithmetic = flops / self.rates[dtype] if flops else 0.0
        return max(arithmetic, size / self.bandwidth)

    def as_dict(self) -> dict:
        rates = {str(d).removeprefix("torch."): r / 1e9 for d, r in self.rates.items()}
        return {"copy_gb_per_s": self.bandwidth / 1e9, "matrix_gflop_per_s": rates}


def best_seconds(call, device: str, repeats: int = 7) -> float:
    """The shortest of several runs after one that is not counted."""
    call()
    if device == "cuda":
        found = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        return min(found)
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def measure_limits(device: str, dtypes: list[torch.dtype]) -> Limits:
    """Copies 256 MiB (1 GiB on CUDA) and multiplies square matrices with ``torch.mm``.

    On a CPU the rates of weft's own inner loops count too, where they are faster than ``torch.mm``:
    they come closer to what the processor can do.
    """
    count = (1 << 30) if device == "cuda" else (1 << 28)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), device)
    rates = {}
    for dtype in dtypes:
        n = 8192 if device == "cuda" and dtype != torch.float64 else 2048
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[dtype] = 2 * n**3 / best_seconds(lambda a=a, b=b: a @ b, device)
    if device == "cpu":
        for dtype, rate in inner_loop_rates().items():
            if dtype in rates:
                rates[dtype] = max(rates[dtype], rate)
    return Limits(2 * count / copy, rates)


def inner_loop_rates() -> dict[torch.dtype, float]:
    """FLOP/s of multiply-adds between registers by dtype, one core's times the number of threads;
    empty without the native library."""
    if native.cpu_level is None:
        return {}
    fma = native.cpu_op("microkernel_fma_rate")
    threads = torch.get_num_threads()
    rates = {d: threads * fma(torch.empty(0, dtype=d)) for d in (torch.float32, torch.float64)}
    bfloat16 = native.cpu_op("microkernel_bfloat16_rate")(torch.empty(0))
    if bfloat16:
        rates[torch.bfloat16] = threads * bfloat16
    return rates


def is_busy(machine: dict) -> bool:
    """Others run on this machine: its times are longer than they would be."""
    processors = os.cpu_count() or 1
    return machine["load"] is not None and machine["load"] > 1.25 * processors
