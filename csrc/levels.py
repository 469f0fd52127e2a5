"""The instruction-set levels of the CPU kernels: each is compiled into a library of its own."""

import functools
import platform
import re
from pathlib import Path

HERE = Path(__file__).parent
AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mavx512vnni"
ISA_FLAGS = {
    "generic": "",
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16 -mavx512vpopcntdq",
    "amx": f"{AVX512} -mavx512bf16 -mavx512vpopcntdq -mamx-tile -mamx-bf16 -mamx-int8",
}
CPU_LEVELS = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["generic"]
# The macros by which a source, or a header of ours, asks for what a level adds to the one below.
# WEFT_CPU is the level's own name.
ADDED = {
    "avx512_bf16": r"__AVX512(BF16|VPOPCNTDQ)__|\bWEFT_CPU\b",
    "amx": r"__AMX_|\bWEFT_CPU\b",
}


@functools.cache
def text_of(source: Path) -> str:
    """With that of the headers of ours that it includes."""
    own = source.read_text()
    return own + "".join(text_of(HERE / name) for name in re.findall(r'#include "(.*)"', own))


def compiled_for(source: Path, level: str) -> str:
    """The level whose object a library links: a lower one where the source asks for nothing more.

    The upper levels share most objects so. That is safe, as no definition in them depends on what
    was not asked for, and a level runs all instructions of those below."""
    while level in ADDED and not re.search(ADDED[level], text_of(source)):
        level = CPU_LEVELS[CPU_LEVELS.index(level) - 1]
    return level
