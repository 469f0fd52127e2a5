#!/usr/bin/env bash
# Builds, tests and times weft on a machine with an NVIDIA GPU. Nothing is downloaded.
#
#   scripts/gpu_check.sh --build           the native libraries, and what runs here
#   scripts/gpu_check.sh --tests           everything that needs the GPU
#   scripts/gpu_check.sh --bench pairwise  one family
#
# Each part ends within ten minutes and leaves its log and results in out/gpu/. It uses the python3
# on PATH (or $PYTHON) with the packages that it has; weft need not be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=out/gpu
LIMIT=580 # seconds

mkdir -p "$OUT/path"

usage() { sed -n '4,6p' "$0" | cut -c3-; exit 2; }

# Names the modules that a part cannot do without, and stops if one is missing.
require() {
  "$PYTHON" - "$@" <<'CHECK'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu_check: {sys.executable} has no {', '.join(missing)}: this part cannot run")
CHECK
}

# A package directory of links, so that the tree is importable without an installation.
link_package() {
  rm -rf "$OUT/path/weft"
  mkdir -p "$OUT/path/weft"
  ln -s "$PWD"/python/weft/* "$OUT/path/weft/"
  ln -sfn "$PWD/triton_kernels" "$OUT/path/weft/triton_kernels"
  export PYTHONPATH="$PWD/$OUT/path:$PWD"
}

# Runs a command under the time limit, with its output shown and kept.
logged() {
  local log="$OUT/$1.log" status=0
  shift
  timeout "$LIMIT" "$@" 2>&1 | tee "$log" || status=${PIPESTATUS[0]}
  [ "$status" -ne 124 ] || echo "gpu_check: stopped after $LIMIT s" | tee -a "$log"
  return "$status"
}

# The machine and its versions, to stdout and machine.txt; stops where no GPU would be used.
describe() {
  command -v nvidia-smi >/dev/null || { echo "gpu_check: nvidia-smi is missing: no GPU here"; exit 1; }
  {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$PYTHON" -c 'if True:
      import importlib.metadata, sys, torch
      print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
      for name in ("triton", "numpy", "pytest", "setuptools", "ninja", "pybind11"):
          try:
              print(name, importlib.metadata.version(name))
          except importlib.metadata.PackageNotFoundError:
              print(name, "is missing")'
  } | tee "$OUT/machine.txt"
  "$PYTHON" -c 'import torch; torch.cuda.is_available() or exit("gpu_check: this torch sees no GPU")'
}

part=${1:-}
case "$part" in
  --build)
    require torch setuptools pybind11
    command -v ninja >/dev/null || require ninja
    "$PYTHON" -c 'import setuptools as s; int(s.__version__.split(".")[0]) >= 77 or exit(
      f"gpu_check: setuptools {s.__version__} is too old for pyproject.toml: 77 is needed")'
    command -v nvcc >/dev/null || echo "gpu_check: nvcc is not on PATH: no CUDA library"
    describe
    WEFT_REQUIRE_NATIVE=1 logged build "$PYTHON" setup.py build_ext --inplace
    link_package
    logged status "$PYTHON" -m weft
    ;;
  --tests)
    require torch triton pytest
    link_package
    describe
    logged tests "$PYTHON" -m pytest tests/gpu tests/triton_ops tests/test_contract.py -q \
      -k "cuda or gpu or triton" -p no:cacheprovider --junitxml="$OUT/tests.xml"
    ;;
  --bench)
    family=${2:-}
    [ -n "$family" ] || usage
    require torch triton
    link_package
    describe
    logged "bench_$family" "$PYTHON" -m weft bench "$family" --device cuda \
      --json "$OUT/$family.json"
    ;;
  *) usage ;;
esac
