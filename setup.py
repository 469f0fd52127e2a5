"""Builds the native libraries: weft/_cpu_<isa>.so, weft/_cuda.so and weft/_host. One ninja graph, no ATen.

Environment: CXX, WEFT_NVCC (path), WEFT_CUDA=0 (skip), WEFT_CUDA_ARCHS ("80;90a"), WEFT_REQUIRE_NATIVE=1.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
from levels import CPU_LEVELS, ISA_FLAGS, compiled_for  # noqa: E402

TARGET = "0x020a000000000000"  # torch 2.10, the lowest stable ABI that has all that the sources use
FOLDERS = ["triton_kernels", "benchmarks"]  # of the repository: packages inside weft, also in a wheel
NO_TORCH = "torch is not in the build environment; use: pip install --no-build-isolation ."


class NativeBuild(build_ext):
    """One ninja graph in place of distutils' compiler, which gives the levels one object path."""

    def run(self):
        if importlib.util.find_spec("torch") is None:
            raise SystemExit(f"weft: {NO_TORCH}")
        try:
            self.build()
        except Exception as error:  # no compiler, header or tool: the reference still works
            if os.environ.get("WEFT_REQUIRE_NATIVE") == "1":
                raise
            message = f"weft: native build incomplete, the reference runs in its place: {error}"
            print(message, file=sys.stderr, flush=True)
            (self.package_directory() / "_build_error.txt").write_text(message + "\n")

    def package_directory(self):
        in_place = self.inplace or self.editable_mode
        path = ROOT / "python/weft" if in_place else Path(self.build_lib).resolve() / "weft"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def build(self):
        out, work = self.package_directory(), ROOT / "build/native"  # build_temp does not outlive
        work.mkdir(parents=True, exist_ok=True)  # an editable install
        for stale in [*out.glob("_*.so"), out / "_build_error.txt"]:
            stale.unlink(missing_ok=True)
        graph = ninja_file(out)
        (work / "build.ninja").write_text(graph)
        ninja = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
        if ninja is None:
            raise RuntimeError("ninja was not found")
        done = subprocess.run(
            [ninja, "-C", str(work), "-k", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout, flush=True)
        if done.returncode:
            lines = done.stdout.splitlines()
            clear = ("error:", "not found", "cannot find", "FAILED")  # from the clearest to the vaguest
            why = next((x for word in clear for x in lines if word in x), "ninja failed")
            unbuilt = [n for n in re.findall(r"^build \S*?/(_\w+)\S*\.so:", graph, re.M) if not [*out.glob(f"{n}*.so")]]
            raise RuntimeError(f"without {', '.join(unbuilt)}: {why}")

    def get_outputs(self):
        return [str(path) for path in self.package_directory().glob("_*.so")]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc"]


def cuda_archs():
    """The card that is there, else Hopper."""
    if asked := os.environ.get("WEFT_CUDA_ARCHS"):
        return asked.split(";")
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    return sorted({cap.replace(".", "") + ("a" if cap == "9.0" else "") for cap in found}) or ["90a"]


def ninja_file(out):
    import pybind11

    # Found without importing torch, which takes seconds.
    torch = Path(importlib.util.find_spec("torch").origin).parent
    cxx = os.environ.get("CXX", "c++")
    nvcc = None
    if os.environ.get("WEFT_CUDA") != "0":
        nvcc = os.environ.get("WEFT_NVCC") or shutil.which("nvcc")
    stable = f"-I{torch}/include -I{ROOT}/csrc -DTORCH_TARGET_VERSION={TARGET}"
    link = f"-shared -Wl,-Bsymbolic -L{torch}/lib -Wl,--no-as-needed -ltorch -Wl,--as-needed"
    lines = [  # contract=off: fused in one of a loop's two versions, bits depend on the distance of arrays
        "cxxflags = -std=c++20 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden "
        "-ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wno-unknown-pragmas",
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d $cxxflags $flags -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} $in -o $out $flags",
    ]

    def library(name, compile_rule, folder, pattern, flags, link_flags, link_rule="link", home=lambda source: ""):
        objects = []
        for source in sorted(folder.rglob(pattern)):
            of = home(source) or name  # another library's objects are in that one's rules
            objects.append(f"{of}/{source.relative_to(folder).with_suffix('.o')}")
            if of == name:
                lines.append(f"build {objects[-1]}: {compile_rule} {source}\n  flags = {flags}")
        lines.append(f"build {out}/{name}: {link_rule} {' '.join(objects)}\n  flags = {link_flags}")

    for isa in CPU_LEVELS:
        flags = f"{stable} {ISA_FLAGS[isa]} -DWEFT_CPU=weft_cpu_{isa}"
        home = lambda source, isa=isa: f"_cpu_{compiled_for(source, isa)}.so"  # noqa: E731
        library(f"_cpu_{isa}.so", "cxx", ROOT / "csrc/cpu", "*.cpp", flags, link, home=home)
    host = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library(f"_host{suffix}", "cxx", ROOT / "csrc/host", "*.cpp", host, "-shared")
    if nvcc and [*ROOT.glob("csrc/cuda/**/*.cu")]:
        codes = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda_archs())
        lines.append(
            f"rule nvcc\n  command = {nvcc} -ccbin {cxx} -MD -MF $out.d -std=c++20 -O3 {codes} "
            "-Xcompiler=-fPIC,-fvisibility=hidden --expt-relaxed-constexpr -DUSE_CUDA $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc"
        )
        # nvcc links too: it knows where its static cudart is, even behind a wrapper script.
        lines.append(f"rule cuda_link\n  command = {nvcc} -ccbin {cxx} $in -o $out $flags")
        flags = f"-shared -cudart static -L{torch}/lib -Xlinker=--no-as-needed -ltorch -Xlinker=--exclude-libs=ALL"
        library("_cuda.so", "nvcc", ROOT / "csrc/cuda", "*.cu", stable, flags, "cuda_link")
    return "\n".join(lines) + "\n"


setup(
    packages=find_packages("python") + [f"weft.{p}" for f in FOLDERS for p in find_packages(include=[f"{f}*"])],
    package_dir={"": "python", **{f"weft.{folder}": folder for folder in FOLDERS}},
    ext_modules=[Extension("weft._host", [])],  # only for the wheel's tag, and for build_ext to run at all
    cmdclass={"build_ext": NativeBuild},
)
