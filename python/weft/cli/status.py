"""The environment, the native libraries and, op by op, what runs here and why the rest does not."""

import platform

import torch

from weft import native
from weft.benchmarks.machine import installed_version, processor
from weft.cli.console import Cell, Console
from weft.ops.cases import discover
from weft.ops.registration import registry


def status() -> int:
    console = Console()
    list(discover())  # imports every family
    environment(console)
    libraries(console)
    operations(console)
    return 0


def environment(console: Console) -> None:
    triton = installed_version("triton") or "not installed: the GPU kernels need it"
    cuda = "this torch is a CPU build"
    if torch.version.cuda is not None:
        cuda = f"{torch.version.cuda}, no GPU found"
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            cuda = f"{torch.version.cuda} on {torch.cuda.get_device_name()} (sm_{major}{minor})"
    console.heading("Environment")
    console.table(
        ("", ""),
        [
            ("weft", installed_version("weft") or "not installed"),
            ("Python", f"{platform.python_version()} on {platform.system()}"),
            ("torch", torch.__version__),
            ("triton", triton),
            ("CUDA", cuda),
            ("processor", f"{processor()}, {torch.get_num_threads()} threads"),
        ],
    )


def libraries(console: Console) -> None:
    """Each native library: in use, or why not."""
    rows: list[tuple[Cell, ...]] = []
    supported = native.supported_levels()
    for level in native.LEVELS:
        if level == native.cpu_level:
            state: Cell = ("in use", "good")
        elif level in supported:
            better = native.LEVELS.index(native.cpu_level or level) > native.LEVELS.index(level)
            state = (f"would run; {native.cpu_level} is {'better' if better else 'asked for'}", "")
        elif (native.HERE / f"_cpu_{level}.so").exists():
            state = ("not loaded: this processor does not have these instructions", "weak")
        else:
            state = (f"not there: {native.missing.get('cpu', 'not built')}", "weak")
        rows.append((f"CPU, {level}", state))
    cuda = ("in use", "good") if native.has_cuda else (native.missing.get("cuda", ""), "weak")
    rows.append(("CUDA", cuda))
    console.heading("Native libraries")
    console.table(("library", "state"), rows)


def operations(console: Console) -> None:
    """Every op with every implementation, on each kind of device that is here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        rows: list[tuple[Cell, ...]] = []
        for op in registry.values():
            chosen = False
            for known in op.dispatcher.implementations:
                why = known.static_reasons(device, torch.float32)
                if why:
                    state: Cell = (f"no: {'; '.join(why)}", "weak")
                elif not chosen:
                    state, chosen = ("runs", "good"), True
                else:
                    state = ("could run", "")
                first = known is op.dispatcher.implementations[0]
                name = f"{op.family}: {op.name}" if first else ""
                rows.append((name, known.name, state))
        console.heading(f"Operations on {device} tensors, float32")
        console.table(("op", "implementation", "state"), rows)
