# make demo      install, then the whole kNN-LM pipeline on a small real text (2 ranks)
# make install   only install, into .venv (GPU=1: .venv-gpu)
# make test      install, then style, types, import rules and the tests, without those marked slow or gpu
# make test-slurm   only the tests on a real Slurm of four nodes, which they start on this machine (root, apt-get)
# make demo GPU=1 and make test GPU=1: the same on CUDA with faiss-gpu
# make gpu-check GPU=1   what a GPU does with distlm: ten minutes at most; DEVICE=sim or cpu without one, PARTS=memory,lstm some of it
# make gpu-wheels   what that needs on a machine without a network, in build/gpu-wheels (GPU_PYTHON=3.12 WITHOUT=transformers)
# make site      the documentation as a site, in build/site
# make test TESTS=tests/config   only those tests, after style, types and import rules
# PYTHON=python3.12 chooses the interpreter, PIP_FLAGS="..." is handed to pip (e.g. an index with CPU builds of torch)

PYTHON ?= python3
GPU ?= 0
PIP_FLAGS ?=
TESTS ?=
DEVICE ?= gpu
PARTS ?=
GPU_PYTHON ?=
WITHOUT ?=
VENV ?= $(if $(filter 1,$(GPU)),.venv-gpu,.venv)
FAISS := $(if $(filter 1,$(GPU)),gpu,cpu)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.PHONY: install demo site test some-tests all-tests test-gpu test-slurm test-slow gpu-check gpu-wheels \
  slurm-packages bare-packages lint clean-demo clean help
.DEFAULT_GOAL := help
# Tests start Python thousands of times: where this is set, each start compiles the package anew, and pytest its tests.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

# torch comes first, so that a build of DeepSpeed that looks for it finds this one. No operator is compiled.
$(VENV)/.base: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "distlm needs Python 3.11 to 3.13 and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	@echo "installing into $(VENV) (torch, deepspeed, faiss-$(FAISS), MPI); a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) pip setuptools wheel hatchling
	@$(PIP) torch numpy ninja
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(PIP) --no-build-isolation -e '.[$(FAISS),demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(PIP) --no-build-isolation -e '.[$(FAISS),demo,dev]'
	@touch $@

install: $(VENV)/.base

demo: $(VENV)/.base
	$(BIN)/distlm run demo

test: $(VENV)/.dev lint $(if $(TESTS),some-tests,all-tests)

some-tests: $(VENV)/.dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not gpu and not slow" $(TESTS)

all-tests: $(VENV)/.dev slurm-packages
	@# One Slurm on a machine, and minutes of waiting for it: its tests run in a process of their own beside the others.
	@# Most tests wait for the ranks that they start, so there are more processes than cores, of one thread each.
	@$(BIN)/python -m pytest -m "slurm and not slow" tests/slurm >.slurm-tests.log 2>&1 & slurm=$$!; \
	  OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 3 --dist worksteal -m "not gpu and not slow and not slurm"; others=$$?; \
	  echo "waiting for the tests on Slurm"; wait $$slurm; code=$$?; cat .slurm-tests.log; exit $$((others | code))
	@echo "not run: GPU checks (make test-gpu GPU=1, need CUDA) and slow checks (make test-slow, minutes each)"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	@# A call of its own for the tests: they import tests/support as `support`, which is no name from the root, need not
	@# annotate their functions, and compare with pytest.approx. Both calls at once, each with a cache of its own.
	@MYPYPATH=tests $(BIN)/mypy --cache-dir .mypy_cache/tests --explicit-package-bases --allow-untyped-defs \
	    --allow-incomplete-defs --check-untyped-defs --no-strict-equality tests >.mypy-tests.log 2>&1 & tests=$$!; \
	  echo "types of distlm, launchers and benchmarks"; $(BIN)/mypy; package=$$?; \
	  wait $$tests; code=$$?; echo "types of the tests"; cat .mypy-tests.log; exit $$((package | code))
	$(BIN)/lint-imports --no-cache

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

# The tests start a Slurm of four nodes of their own from Debian's packages. Without them they say that they skip.
slurm-packages:
	@bash tests/slurm/cluster.sh install >.slurm-packages.log 2>&1 || \
	  echo "the tests on a real Slurm will be skipped: $$(tail -n 1 .slurm-packages.log)"

test-slurm: $(VENV)/.dev
	bash tests/slurm/cluster.sh install
	DISTLM_REQUIRE_SLURM=1 $(BIN)/python -m pytest -m slurm tests/slurm

# The tests of a bare machine make one with it; without it they say that they skip.
bare-packages:
	@command -v mmdebstrap >/dev/null || (apt-get update && apt-get install -y mmdebstrap) >.bare-packages.log 2>&1 || \
	  echo "the tests on a bare machine will be skipped: no mmdebstrap"

test-slow: $(VENV)/.dev bare-packages
	$(BIN)/python -m pytest -m slow

# Without GPU=1 a machine with a GPU is asked by the torch of .venv, whatever build that is.
gpu-check: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu_check.py --device $(DEVICE) --parts "$(PARTS)" --out build/gpu-check

gpu-wheels: $(VENV)/.dev
	PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python benchmarks/gpu/wheels.py $(if $(GPU_PYTHON),--python $(GPU_PYTHON)) --without "$(WITHOUT)"

site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "build/site/index.html"

clean-demo:
	rm -rf runs/demo

clean: clean-demo
	rm -rf .venv .venv-gpu
