"""Compiles every launch of every Triton kernel for cards that need not be here.

A module with kernels has `example_launches(dtype)`, which calls its launchers on meta tensors.
"""

import functools
import re
import subprocess
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import weft.triton_kernels  # noqa: E402
from weft.triton_kernels import common  # noqa: E402

pytestmark = pytest.mark.skipif(common.INTERPRETED, reason="needs the compiler")

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # 80 serves 86, 89 and 120 too
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Bytes of stack that a kernel may use, by name, with the reason. None has one.
STACK_ALLOWED: dict[str, int] = {}

packages = weft.triton_kernels.__path__, "weft.triton_kernels."
MODULES = [import_module(m.name) for m in walk_packages(*packages) if not m.ispkg]
WITH_KERNELS = [
    module
    for module in MODULES
    if any(
        isinstance(value, triton.JITFunction) and value.__module__ == module.__name__
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    )
]


def launches(module, dtype: torch.dtype, architecture: int) -> list[common.Launch]:
    with common.record(architecture) as seen:
        module.example_launches(dtype)
    return seen


def source(launch: common.Launch) -> ASTSource:
    """As Triton specialises a call: ones and None are constants, divisibility by 16 is known."""
    constants, attributes = {}, {}

    def kind(value, path: tuple[int, ...]):
        if isinstance(value, tuple):
            kinds = [kind(part, (*path, n)) for n, part in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, int):
            if value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    signature = {}
    given = iter(launch.args)
    for index, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = launch.constants[parameter.name]
        else:
            signature[parameter.name] = kind(next(given), (index,))
    assert next(given, None) is None
    return ASTSource(launch.kernel, signature, constants, attributes)


def key_of(launch: common.Launch, architecture: int) -> tuple:
    """What decides the machine code."""
    from_source = source(launch)
    parts = (from_source.signature, from_source.constants, from_source.attrs)
    named = tuple(tuple(sorted(map(str, part.items()))) for part in parts)
    options = (launch.config.num_warps, launch.config.num_stages)
    return launch.kernel.__name__, architecture, *options, *named


@functools.cache
def tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def compile_and_check(launch: common.Launch, architecture: int, folder: Path) -> None:
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source(launch), target=target, options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [tool("cuobjdump"), "-res-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK", "LOCAL")
    )
    name, tiles = launch.kernel.__name__, launch.constants
    print(f"{name} sm_{architecture} {tiles}: {registers=} {stack=} {compiled.metadata.shared=}")
    assert compiled.metadata.shared <= SHARED_LIMIT[architecture], (name, tiles)
    assert stack + local <= STACK_ALLOWED.get(name, 0), (name, tiles, registers, "spills")
    if launch.matrix_product:
        assert MATRIX_INSTRUCTION[architecture] in compiled.asm["ptx"], (name, tiles)


def test_every_kernel_has_an_example():
    """A kernel that no example launches would go unchecked."""
    for module in WITH_KERNELS:
        launched = {launch.kernel.__name__ for launch in launches(module, torch.bfloat16, 90)}
        kernels = {
            name
            for name, value in vars(module).items()
            if isinstance(value, triton.JITFunction) and value.__module__ == module.__name__
        }
        assert {k for k in kernels if k.endswith("_kernel")} <= launched, module.__name__


def first_of_each_kernel(seen: list[common.Launch]) -> list[common.Launch]:
    return list({launch.kernel.__name__: launch for launch in reversed(seen)}.values())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("module", WITH_KERNELS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_first_example_on_hopper(module, dtype, tmp_path):
    for launch in first_of_each_kernel(launches(module, dtype, 90)):
        compile_and_check(launch, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("module", WITH_KERNELS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_example(module, dtype, architecture, tmp_path):
    different = {key_of(one, architecture): one for one in launches(module, dtype, architecture)}
    for launch in different.values():
        compile_and_check(launch, architecture, tmp_path)
