# make demo    edgevlm demo: a tiny model learns to name, count and point at digits, and is deployed
# make demo-exact   every step on a tiny model of random weights, equal to the original, no torch
# make test    the test suite
# make test-rtx     NVIDIA's builder on this machine, which needs no card; installs it (docs/tensorrt.md)
# make test-scale   a batch on Ray, and Triton's own client; installs both (docs/serving.md)
# make test-kernels   fused kernels for every card, without one; installs Triton (docs/extending.md)
# make fuzz N=60000   mutated images, requests, checkpoints, bundles and engines; S=1 chooses others
# make gpu     kernels and engines on this machine's graphics card, six minutes; needs torch for CUDA
# make check   formatting, lint, types, imports and sizes
# make bench   the benchmarks
# make docs    the documentation as a site in site/; refuses broken links and anchors
# make wheel   dist/edgevlm-*.whl
# make clean   removes what these made;  make distclean  removes the environment too
#
# Every target sets up what it needs in $(VENV) the first time. Needs Python 3.10 or newer.
# PYTHON=python3.12 chooses the interpreter; PIP_ARGS is handed to pip; JOBS=1 tests in one process.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
JOBS ?= auto

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_ARGS)
BENCHMARKS := start_up export lm_decode precision train_step
BINDINGS := 10.13.3.9 11.4.0.106
HEADERS := v10.3.0 v11.1
CODE := __init__.py api.py cli.py requantize.py sizing.py toolkit export engines training calibration tests examples benchmarks

.NOTPARALLEL:
.PHONY: demo demo-exact test test-rtx test-scale test-kernels fuzz gpu check types bench docs wheel clean distclean

demo: $(VENV)/.demo
	$(BIN)/edgevlm demo demo-out

demo-exact: $(VENV)/.demo-exact
	$(BIN)/python -m examples.demo_exact

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m 'not rtx and not scale and not kernels'

test-rtx: $(VENV)/.rtx
	$(BIN)/python -m pytest -m rtx tests/rtx

test-scale: $(VENV)/.scale
	$(BIN)/python -m pytest -m scale tests/engines/serving

test-kernels: $(VENV)/.kernels
	$(BIN)/python -m pytest tests/kernels tests/engines/plugins

N ?= 60000
S ?= 0

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz $(N) $(S)
	$(BIN)/python -m tests.fuzz.kills 100 $(S)
	$(BIN)/python -m tests.fuzz.kills 100 verbs

gpu:
	$(PYTHON) -m benchmarks.gpu

check: $(VENV)/.dev
	$(BIN)/python -m ruff format --check $(CODE)
	$(BIN)/python -m ruff check $(CODE)
	$(BIN)/python -m pytest tests/test_structure.py
	$(MAKE) --no-print-directory types

# mypy does not read editable installs: it gets a folder in which `edgevlm` is a link to this one.
types: $(VENV)/.dev
	@mkdir -p $(VENV)/typing && ln -sfn "$(CURDIR)" $(VENV)/typing/edgevlm
	MYPYPATH=$(VENV)/typing $(BIN)/python -m mypy

bench: $(VENV)/.dev
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict --quiet

wheel: $(VENV)/.dev
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist site demo-out demo-exact-out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# -- set-up: one stamp per environment, made again when what is installed changes ---------------

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $$($(PYTHON) --version 2>&1) is too old; edgevlm needs Python 3.10 or newer"; \
	    echo "hint: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "error: $(PYTHON) cannot make virtual environments"; \
	    echo "hint: on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing what the demo needs into $(VENV), torch among it (takes a while) ..."
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable '.[demo]'
	@touch $@

# The exact demo takes one photograph from scikit-image's folder and needs none of its code.
$(VENV)/.demo-exact: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing what the demo needs into $(VENV) ..."
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable '.[cpu,export]'
	@$(INSTALL) --no-deps scikit-image
	@touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml constraints.txt
	@$(INSTALL) 'mkdocs>=1.6'
	@touch $@

$(VENV)/.rtx: $(VENV)/.dev
	@$(INSTALL) --no-build-isolation --editable '.[tensorrt-rtx]'
	@touch $@

$(VENV)/.scale: $(VENV)/.dev
	@$(INSTALL) --no-build-isolation --editable '.[ray]' 'tritonclient[grpc]'
	@touch $@

# TensorRT's bindings are read by a stand-in, and not installed; its headers are open source. Tests
# say so where one of them cannot be had.
$(VENV)/.kernels: $(VENV)/.dev
	@$(INSTALL) --no-build-isolation --editable '.[kernels]'
	@mkdir -p $(VENV)/tensorrt
	-@for release in $(BINDINGS); do $(BIN)/python -m pip --disable-pip-version-check download --quiet \
	  --no-deps --dest $(VENV)/tensorrt tensorrt-cu13-bindings==$$release; done
	-@for release in $(HEADERS); do test -d $(VENV)/tensorrt/$$release || { \
	  GIT_TERMINAL_PROMPT=0 git clone --quiet --depth 1 --filter=blob:none --sparse --branch $$release \
	    https://github.com/NVIDIA/TensorRT $(VENV)/tensorrt/$$release && \
	  git -C $(VENV)/tensorrt/$$release sparse-checkout set include; }; done
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing what development needs into $(VENV), torch among it (takes a while) ..."
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.demo-exact
