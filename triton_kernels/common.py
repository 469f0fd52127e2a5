"""What the Triton kernels share: launching, tables of launch configurations, rounding.

Every kernel starts through `launch`, and every size that the compiler fixes comes from `configure`.
So a test can ask any launcher for small tiles (`tiles_at_most`), or run it on meta tensors and get
the list of its launches (`record`), to compile them without a GPU for a card it names. A module
with kernels has `example_launches(dtype)` for that: it calls its launchers on meta tensors.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class Config:
    """Tile sizes by the name of the kernel's argument, and how Triton compiles for them."""

    tiles: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Launch:
    """A launch that `record` saw in place of running it."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    constants: dict
    config: Config
    matrix_product: bool  # the kernel is meant to use the matrix units for these dtypes


@dataclass
class _Recording:
    architecture: int
    launches: list[Launch] = field(default_factory=list)


_recording: _Recording | None = None
_largest_tile: int | None = None


@contextmanager
def record(architecture: int) -> Iterator[list[Launch]]:
    """Collects the launches of the block, as for a card of this compute capability (90, ...)."""
    global _recording
    _recording = _Recording(architecture)
    try:
        yield _recording.launches
    finally:
        _recording = None


@contextmanager
def tiles_at_most(size: int) -> Iterator[None]:
    """No tile of a launch in the block is larger, so that small inputs have several."""
    global _largest_tile
    _largest_tile = size
    try:
        yield
    finally:
        _largest_tile = None


def architecture(device: torch.device) -> int:
    """Compute capability as one number: 80, 90, 100, ..."""
    if _recording is not None:
        return _recording.architecture
    return _capability(device) if device.type == "cuda" else 90


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configure(table: dict, device: torch.device, *shape_class) -> Config:
    """The entry of (architecture, *shape class): of the newest architecture up to this card's."""
    card = architecture(device)
    if 120 <= card < 130:
        card = 89  # the shared memory and the matrix instructions of sm_89
    known = [key[0] for key in table if key[1:] == shape_class]
    entry = max((number for number in known if number <= card), default=min(known))
    config = table[(entry, *shape_class)]
    if _largest_tile is None:
        return config
    tiles = {name: min(size, _largest_tile) for name, size in config.tiles.items()}
    return Config(tiles, config.num_warps, config.num_stages)


def launch(
    kernel, grid: tuple[int, ...], config: Config, *args, matrix_product: bool = False, **constants
) -> None:
    """Starts the kernel on the device of its first argument. A tile named in `constants` wins."""
    constants = {**config.tiles, **constants}
    if _recording is not None:
        seen = Launch(kernel, grid, args, constants, config, matrix_product)
        _recording.launches.append(seen)
        return
    device: torch.device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **_compile_options(config))
    else:
        kernel[grid](*args, **constants, **_compile_options(config))


def _compile_options(config: Config) -> dict:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b through torch.mm, for the large products that cuBLAS does best.

    ``out`` may be float32 for half-precision factors. Given ``out``, autocast leaves it alone.
    """
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # interpreted: no such product there
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def float32_precision() -> str:
    """Of the products of float32 tiles: "ieee", or "tf32" where PyTorch was told to use it.

    What is recorded is the form with matrix instructions.
    """
    if _recording is not None:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def operand(tile):
    """A factor of `tl.dot`: the interpreter multiplies the bit patterns of bfloat16."""
    if _INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 to dtype, to nearest even: the interpreter truncates to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        nearest = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    return value.to(dtype)


@triton.jit
def usable_scale(largest):
    """What to divide by before squaring, without rounding: the power of 2 below the largest |value|
    (float32; at least the smallest normal number), 1 where that is 0 or not finite."""
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 2.0**-126)
    return tl.where((largest > 0) & (largest < float("inf")), power, 1.0)


@triton.jit
def tanh(z):
    """By its series where 1 − 2/(1 + e^2z) would cancel."""
    q = z * z
    series = 62.0 / 2835 + q * (-1382.0 / 155925 + q * (21844.0 / 6081075))
    series = 1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * series)))
    tail = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(z)))
    return tl.where(tl.abs(z) < 0.4, z * series, tl.where(z < 0, -tail, tail))
