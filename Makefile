# From a fresh clone: `make train` or `make test`. Nothing has to be installed first but Python
# 3.10 to 3.13 with its venv module. `make help` lists everything.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install train test test-gpu test-slurm lint typecheck clean

# python3 if the project supports it, else the newest supported one.
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
    if $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; \
    then echo $$python; break; fi; done)
endif
RECIPE ?= stdlib-small-dualpipe-v
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
OTHER_CORE := .cache/other-core
OLDEST_TRITON := .cache/oldest-triton
# Where there is a C++ compiler, the extension that launches kernels is built as well.
NATIVE := $(shell command -v c++ || command -v g++)
# The folders that setup.py installs inside mhc_megatron.
MAPPED := kernels pipeline launch
# The tests whose outcome may depend on the version of megatron-core.
CORE_TESTS := tests/data tests/megatron
# Two tests at a time: each waits for processes of its own most of the time. In the order of
# tests/conftest.py, where the longest files are the first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Whatever the environment says: the tests start a hundred processes, which would all compile the
# same modules.
export PYTHONDONTWRITEBYTECODE :=
say = @printf '\n==> %s\n'

help:
	@echo 'make train      train a small GPT with hyper-connections on Python'"'"'s own sources'
	@echo 'make test       check style and types, run all tests on two versions of megatron-core'
	@echo 'make test-gpu   the tests that need a GPU and Transformer Engine, which fail without'
	@echo 'make test-slurm trains on two SLURM nodes of this machine; needs slurm-wlm and munge, and root'
	@echo 'make install    only set up the virtual environment .venv, which the others do as well'
	@echo 'make lint       check style; make typecheck: check types'
	@echo 'make clean      remove .venv and all caches, but not runs/'
	@echo
	@echo 'PYTHON=python3.12 chooses the Python of a new .venv (now: $(PYTHON)).'
	@echo 'RECIPE=stdlib-small trains another recipe (TP=2), ARGS="--set steps=50" changes it.'

install: $(INSTALLED)

train: $(INSTALLED)
	$(say) 'Training $(RECIPE) (mhc-megatron train --help explains the rest)'
	@$(BIN)/mhc-megatron train --recipe $(RECIPE) $(ARGS)

test: lint typecheck $(OLDEST_TRITON) $(OTHER_CORE)
	$(say) 'All tests, with the installed megatron-core'
	@$(PYTEST)
	$(say) "The tests of $(CORE_TESTS) again, with $$(basename $$(cat $(OTHER_CORE)))"
	@PYTHONPATH=$$(cat $(OTHER_CORE)) $(PYTEST) -m 'not one_core' $(CORE_TESTS)
	$(say) 'All tests passed'

# Transformer Engine is the user's to install, for his CUDA: .venv/bin/pip install -e '.[te]'
test-gpu: $(INSTALLED)
	$(say) 'Tests on a GPU, with Transformer Engine'
	@$(BIN)/python -m pytest -q tests/gpu

test-slurm: $(INSTALLED)
	$(say) 'Training on two SLURM nodes of this machine'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/slurm

lint: $(INSTALLED)
	$(say) 'Style: ruff check and ruff format --check'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy does not follow setup.py's mapping, so it gets the installed layout, made of links.
typecheck: $(INSTALLED)
	$(say) 'Types: mypy on the package'
	@rm -rf .cache/typecheck
	@mkdir -p .cache/typecheck/mhc_megatron
	@ln -s $(addprefix ../../../,$(wildcard mhc_megatron/*) $(MAPPED)) .cache/typecheck/mhc_megatron
	@cd .cache/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	    --cache-dir ../../.mypy_cache -p mhc_megatron

$(INSTALLED): setup.py pyproject.toml constraints.txt kernels/native/replay.cpp
	@test -n '$(PYTHON)' || { echo 'No Python from 3.10 to 3.13 was found. Install one, or name' \
	    'it: make PYTHON=/path/to/python' >&2; exit 2; }
	$(say) "Making the virtual environment .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	$(say) 'Installing the versions of constraints.txt into it (minutes, the first time)'
	@$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	@$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(say) 'Compiling the launch extension for them$(if $(NATIVE),, is left out: no C++ compiler)'
	@test -z '$(NATIVE)' || MHC_MEGATRON_NATIVE=1 $(BIN)/python -m pip install -q \
	    --no-build-isolation --no-deps -e .
	@touch $@

# The tests run on two releases of megatron-core. The one that is not installed is unpacked beside
# .venv, wherever its wheel claims to fit: only its dataset helper is compiled. That one has the
# same source in both releases, so the installed build of it serves the other as well.
$(OTHER_CORE): | $(INSTALLED)
	@version=$$($(BIN)/python -c \
	    'import sys; print("0.19.2" if sys.version_info < (3, 12) else "0.16.1")'); \
	folder=.cache/megatron-core-$$version; datasets=megatron/core/datasets; \
	site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	printf '\n==> %s\n' "Fetching megatron-core $$version, the other tested release, into $$folder"; \
	rm -rf $$folder .cache/wheels; \
	$(BIN)/python -m pip download -q --no-deps --dest .cache/wheels --only-binary=:all: \
	    --python-version 3.12 --platform manylinux_2_28_$$(uname -m) \
	    --platform manylinux_2_24_$$(uname -m) megatron-core==$$version; \
	$(BIN)/python -m zipfile -e .cache/wheels/*.whl $$folder; \
	cmp $$site/$$datasets/helpers.cpp $$folder/$$datasets/helpers.cpp; \
	cp $$site/$$datasets/helpers_cpp*.so $$folder/$$datasets/; \
	echo "$(CURDIR)/$$folder" > $@

# The kernels compile with the oldest Triton that pyproject.toml allows: its language has less.
$(OLDEST_TRITON): $(wildcard kernels/triton/*.py) tests/helpers/compile_kernels.py pyproject.toml \
    | $(INSTALLED)
	@version=$$(sed -n 's/^ *"triton>=\([0-9.]*\)",$$/\1/p' pyproject.toml); \
	folder=.cache/triton-$$version; \
	printf '\n==> %s\n' "The kernels compile with triton $$version, the oldest, in $$folder"; \
	test -e $$folder || { rm -rf .cache/triton-wheels $$folder.part; \
	    $(BIN)/python -m pip download -q --no-deps --dest .cache/triton-wheels --only-binary=:all: \
	        "triton==$$version.*"; \
	    $(BIN)/python -m zipfile -e .cache/triton-wheels/*.whl $$folder.part; \
	    chmod +x $$folder.part/triton/backends/nvidia/bin/*; \
	    mv $$folder.part $$folder; }; \
	PYTHONPATH=$$folder TRITON_CACHE_DIR=.cache/triton $(BIN)/python \
	    tests/helpers/compile_kernels.py n=4 C=1280 operations=pre,post_pre > $@.part; \
	mv $@.part $@; cat $@

clean:
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
