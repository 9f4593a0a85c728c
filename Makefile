# One line each: what a person types, and what .ci/run calls.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
# Where it is set, each of the many processes would compile the project anew, a third of a second each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup proto lint types test test-long faults bench up demo demo-full base base-eval

help: ## Show what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(BIN)/.installed: pyproject.toml hatch_build.py constraints.txt clients/node/package-lock.json $(wildcard services/vlm/native/*) $(shell find protos -name '*.proto' -o -name generate.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	if command -v npm >/dev/null; then npm ci --silent --prefix clients/node; fi
	touch $@

setup: $(BIN)/.installed ## Make the virtual environment and generate the code of the contract

proto: setup ## Generate the contract's code again; check its style and that it breaks no client
	$(BIN)/python protos/generate.py && $(BIN)/buf lint protos && protos/breaking.sh $(BIN)/buf

lint: setup ## Check style, formatting and import walls
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: setup ## Check types, strictly
	$(BIN)/mypy

# Tests wait for processes and leases a quarter of their time. Files in their own order: units, which take seconds, come last.
test: setup ## Run every test that takes seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not e2e_long' --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 25

test-long: setup ## Run the tests that train or start many processes, minutes each
	$(BIN)/pytest -m e2e_long

faults: setup ## Run the fault campaigns at full length and print their figures
	$(BIN)/pytest -m e2e_long tests/integration tests/e2e/main_job

bench: setup ## Measure inference; BASE=DIR holds a base of the full shape with random weights
	for name in inference_adapters inference_pictures inference_slots; do $(BIN)/python tests/benchmarks/$$name.py $(BASE); done
	$(BIN)/python tests/benchmarks/service_overhead.py && $(BIN)/python tests/benchmarks/train_and_serve.py --base $(BASE)

demo: setup ## Learn handwriting and office documents in a cluster of this machine, and show both
	$(BIN)/python -m veneer_cluster.demo

demo-full: setup ## The same path with Qwen3-VL-2B's full shape; BASE=DIR_OR_HUB_ID names real weights
	$(BIN)/python -m veneer_cluster.demo --full $(if $(BASE),--base $(BASE))

up: setup ## Start a cluster on this machine; Ctrl-C stops it
	$(BIN)/veneer up

base: setup ## Train the demonstration base from nothing, or go on where it stopped (build/base)
	$(BIN)/veneer base train --out build/base

base-eval: setup ## Print how well the demonstration base reads
	$(BIN)/veneer base eval
