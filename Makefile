# Everything happens in .venv; nothing is installed outside it. Every target prints the commands that it runs.
#
#   PYTHON       interpreter that .venv is made from (3.10 to 3.13)
#   JOBS         test processes
#   TORCH_INDEX  where Linux machines without an NVIDIA driver get torch from: PyPI's Linux build brings several GB of
#                CUDA libraries along. Empty: PyPI

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
DOCUMENTS ?= 100

ifeq ($(shell uname -s)$(shell command -v nvidia-smi 2>/dev/null),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
else
TORCH_INDEX ?=
endif

BIN := $(VENV)/bin
# No test needs the network, so none may use it. One thread per process: there are several processes.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_EVALUATE_OFFLINE=1
TEST_ENV := $(OFFLINE) TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test lint test-fast test-slow toy docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

install: $(VENV)/.installed  ## make .venv with everything in it (the other targets do that by themselves)

demo: $(VENV)/.installed  ## the toy model on three tasks, decoders side by side; tables in out/demo/
	$(OFFLINE) $(BIN)/s2d2-lmeval demo --limit $(DOCUMENTS)

test: lint test-fast  ## lint, types, and every test that is neither slow nor for a GPU

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-fast: $(VENV)/.installed  ## the tests without lint
	$(PYTEST) -q -m "not slow and not gpu"

test-slow: $(VENV)/.installed  ## the slow tests, and those for a GPU where there is one
	$(PYTEST) -q -m "slow or gpu"

toy: $(VENV)/.installed  ## train the embedded toy model anew
	$(BIN)/python -m s2d2_lmeval.toy.train

docs: $(VENV)/.installed  ## write docs/options.md anew from the code
	$(BIN)/s2d2-lmeval options --markdown > docs/options.md

clean:  ## remove .venv and everything that the tools left behind
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python without ensurepip (Debian's without python3-venv) makes a .venv without pip; its own pip then fills it.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || \
	    ($(PYTHON) -m venv --clear --without-pip $(VENV) && \
	     $(PYTHON) -m pip --python $(VENV)/bin/python install "pip>=22.3")

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install "pip>=22.3"
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --no-deps --retries 1 --timeout 20 --extra-index-url $(TORCH_INDEX) \
	    -c constraints.txt torch
endif
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
