# make run    installs everything into .venv and shows what weft is good for (the demo)
# make test   builds all native libraries and runs the tests; make test-all adds the long legs
# make bench  times every op beside PyTorch and the installed peers
# make lint   ruff and clang-format; make clean removes what make made

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Without an NVIDIA driver torch comes from here: the default index has the CUDA build for Linux,
# which is gigabytes larger.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

VENV := .venv
RUN := $(VENV)/bin/python
# Two processes: most of a test's time is Python.
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal
# setuptools warns of every editable install.
PIP := PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet
# Stamp files: each names what is installed, so that a second make has nothing to do.
TOOLS := $(VENV)/.tools
TORCH_STAMP := $(VENV)/.$(subst ==,-,$(TORCH))
NATIVE := setup.py pyproject.toml csrc/levels.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: run test test-all bench lint format clean

run: $(VENV)/.demo
	$(RUN) -m weft demo

test: $(VENV)/.test
	$(PYTEST) tests
	TRITON_INTERPRET=1 $(PYTEST) tests

test-all: $(VENV)/.test
	$(PYTEST) tests --slow
	TRITON_INTERPRET=1 $(PYTEST) tests --slow

bench: $(VENV)/.demo
	$(RUN) -m weft bench --json out/bench.json --plot out

lint: $(VENV)/.dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

format: $(VENV)/.dev
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

clean:
	rm -rf $(VENV) build dist out python/*.egg-info python/weft/_*.so python/weft/_build_error.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An old setuptools knows neither the licence field nor bdist_wheel, and an isolated build would
# fetch a second torch: so the build tools are installed first, and the build is not isolated.
$(TOOLS):
	@$(PYTHON) -c 'import sys; sys.exit("weft needs Python 3.10 or newer: make PYTHON=python3.12" \
		if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel ninja "pybind11>=3"
	touch $@

$(TORCH_STAMP): $(TOOLS)
	@index=; if [ "$$(uname)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
		if $(RUN) -c 'from urllib.request import urlopen; \
			urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=10)' 2>/dev/null; \
		then index="--extra-index-url $(TORCH_CPU_INDEX)"; \
		else echo "$(TORCH_CPU_INDEX) cannot be reached: torch from the default index"; fi; fi; \
	echo "installing $(TORCH)"; $(PIP) "$(TORCH)" $$index
	touch $@

$(VENV)/.demo: $(TORCH_STAMP) $(NATIVE)
	$(PIP) --no-build-isolation --editable ".[demo]"
	touch $@

# Tests never run on the reference alone because a build failed. timm imports torchvision, which
# would bring the torch that it was built for; what else timm needs comes with transformers.
$(VENV)/.test: $(TORCH_STAMP) $(NATIVE)
	WEFT_REQUIRE_NATIVE=1 $(PIP) --no-build-isolation --editable ".[test]"
	$(PIP) --no-deps timm torchvision==0.28.0
	touch $@ $(VENV)/.demo

$(VENV)/.dev: $(TOOLS)
	$(PIP) ruff clang-format
	touch $@
