"""The shape of the house: every op has all its parts, and importing weft costs little."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import contract
import pytest
import torch

import weft
from weft import native
from weft.ops.cases import discover
from weft.ops.registration import registry

ROOT = Path(__file__).parent.parent
CASES = {cases.name: family for family, cases in discover()}
NEEDED = re.compile(r"lib(torch(_cpu|_cuda)?|stdc\+\+|gcc_s|c|m|dl|pthread|rt)\.so|ld-linux")


def own_files(*patterns: str) -> list[Path]:
    """Files of the checkout, without what builds and environments leave in it."""
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    hidden = {"build", "dist", "out", ".venv", "__pycache__"}
    return [path for path in found if not hidden & set(path.relative_to(ROOT).parts)]


def module_of(op) -> str:
    """Where an op and its public function are defined."""
    return op.dispatcher.implementations[-1].run.__module__


@pytest.mark.parametrize("name", CASES)
def test_public_op_is_exported_and_documented(name):
    assert name in weft.__all__ and callable(getattr(weft, name))
    page = ROOT / "docs" / f"{CASES[name]}.md"
    assert page.exists(), f"{page.name} is missing"
    assert name in page.read_text(), f"{page.name} does not mention {name}"


@functools.cache
def run_by_cases(family: str) -> set[str]:
    """The ops that the samples of a family run, forward and backward."""
    with contract.watch() as log:
        for cases, sample in contract.SAMPLES:
            if CASES[cases.name] == family:
                contract.values_and_gradients(contract.Call(cases, sample, torch.float32))
    return {op for op, *_ in log}


@pytest.mark.parametrize("name", registry)
def test_op_has_a_case(name):
    """Its own, or one of a public function in its module (backwards, in-place forms), or one of its
    family that calls it on the way."""
    modules = {getattr(weft, public).__module__ for public in CASES}
    family = registry[name].family
    if module_of(registry[name]) not in modules:
        assert name in run_by_cases(family), f"no case of {family} runs {name}"


@pytest.mark.parametrize("name", CASES)
def test_parts_share_one_path(name):
    """<family>/<op> in reference/, ops/, and csrc/ or triton_kernels/."""
    module = getattr(weft, name).__module__
    family, stem = module.split(".")[-2:]
    assert module == f"weft.ops.{family}.{stem}" and family == CASES[name]
    own = [op for op in registry.values() if module_of(op) == module]
    if not own:  # it calls the op of another module
        return
    assert (ROOT / "python/weft/reference" / family / f"{stem}.py").exists()
    kinds = {known.name for op in own for known in op.dispatcher.implementations}
    assert "reference" in kinds and kinds & {"cpu", "triton", "cuda"}
    parts = {"cpu": "csrc/cpu/{}.cpp", "triton": "triton_kernels/{}.py", "cuda": "csrc/cuda/{}.cu"}
    for kind in kinds & parts.keys():
        path = ROOT / parts[kind].format(f"{family}/{stem}")
        assert path.exists(), f"{name} declares {kind}: {path.relative_to(ROOT)} is missing"


@pytest.mark.parametrize("name", registry)
def test_reference_never_declines(name):
    last = registry[name].dispatcher.implementations[-1]
    assert last.name == "reference"
    assert last.devices is None and last.dtypes is None and last.refuses is None


def test_nothing_imports_upwards():
    """reference, distributed <- ops <- nn, optim <- integrations; the first need torch alone."""
    above = {
        "distributed": r"weft\b(?!\.distributed)|numpy|triton",
        "reference": r"weft\b(?!\.reference)|numpy|triton",
        "ops": r"weft\.(nn|optim|integrations|cli|benchmarks)",
        "nn": r"weft\.(integrations|cli|benchmarks)",
        "integrations": r"weft\.(cli|benchmarks)",
    }
    for folder, forbidden in above.items():
        for path in own_files(f"python/weft/{folder}/**/*.py"):
            found = re.findall(rf"^(?:from|import) (?:{forbidden}).*", path.read_text(), re.M)
            assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_families_have_benchmarks():
    for family in set(CASES.values()):
        assert (ROOT / "benchmarks" / f"bench_{family}.py").exists()


def test_files_are_short():
    files = own_files(
        "python/**/*.py", "triton_kernels/**/*.py", "benchmarks/*.py", "tests/**/*.py"
    )
    files += own_files("csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu")
    long = {str(f.relative_to(ROOT)): n for f in files if (n := _lines(f)) > 400}
    assert not long, f"more than 400 lines: {long}"
    assert _lines(ROOT / "setup.py") <= 150


def _lines(path: Path) -> int:
    return path.read_text().count("\n")


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    """Under 1.5 s of processor time beyond torch's; no package that it can do without, no CUDA."""
    code = (
        "import time, torch, sys; start = time.process_time(); import weft;"
        "print(time.process_time() - start, torch.cuda.is_initialized(),"
        "*(m for m in ('triton', 'matplotlib', 'rich', 'sklearn', 'timm', 'transformers')"
        " if m in sys.modules))"
    )
    seconds, initialized, *modules = python(code, TRITON_INTERPRET="0").split()
    assert float(seconds) < 1.5
    assert initialized == "False" and not modules


LIBRARIES = sorted(native.HERE.glob("_c*.so"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_need_only_the_stable_abi(library):
    """No C++ symbol of ATen or c10, whose names change from one torch to the next."""
    undefined = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert not re.findall(r".*\b(?:at|c10)::.*", undefined)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_link_only_torch_and_the_system(library):
    dynamic = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    for needed in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        assert NEEDED.match(needed), needed


@pytest.mark.slow
def test_installs_and_runs_without_a_compiler(tmp_path):
    """The package is then the reference alone, and says so at import and in ``python -m weft``."""
    source = tmp_path / "source"
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "python", "benchmarks")
    for name in (*names, "triton_kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_error.txt", "*.egg-info")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target"]
    environment = {**os.environ, "CXX": "false", "WEFT_CUDA": "0", "WEFT_REQUIRE_NATIVE": "0"}
    done = subprocess.run(
        [*pip, tmp_path / "site", source], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    code = (
        "import warnings; warnings.simplefilter('ignore'); import torch, weft;"
        "x = torch.randn(3, 5); s = torch.linalg.qr(torch.randn(2, 5, 2)).Q;"
        "print(weft.__file__, weft.subspace_logits(x, s).shape == (3, 2),"
        " 'native build' in weft.native.missing['cpu'])"
    )
    place, *facts = python(code, PYTHONPATH=str(tmp_path / "site")).split()
    assert place.startswith(str(tmp_path)) and facts == ["True", "True"]
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "weft"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert shown.returncode == 0 and "native build" in shown.stdout
