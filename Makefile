# Everything a person or CI needs; each target sets up .venv first.
#   make demo   trains, builds and samples a small model
#   make check  lint, types and the tests that build nothing
#   make test   every part of the code, on networks as small as can show it: 10 minutes
#   make docs   the documentation site, in site/
#   make bench  dyexport next to its rivals, from models that are trained already
# What takes long to build has lanes of its own; .ci/run runs all of them.
#   make plans     TensorRT-RTX plans: every backbone, precision and token path, and full width
#   make packages  AOTInductor packages: every backbone in fp32 and bf16, every token path, and their engines
#   make sweeps    kills at random, a failure at every write, a model of every size: tests that take minutes each
#   make rehearse  the GPU benchmark and the digits benchmark, rehearsed on the CPU at small sizes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := time -p $(BIN)/python -m pytest -n 2 --dist worksteal --durations=20
# Tests sync many small files: in memory, where it has 8 GB to spare, they do not wait for the disk.
SPARE := $(shell [ "$$(df -k --output=avail /dev/shm 2>&1 | tail -1)" -gt 8000000 ] 2>&1 && echo /dev/shm)
check test: export PYTEST_DEBUG_TEMPROOT = $(SPARE)
unexport PYTHONDONTWRITEBYTECODE  # hundreds of processes import the same modules
SHELL := /bin/bash
INSTALLED := $(VENV)/.installed

.PHONY: setup demo check test lint docs figures bench plans packages sweeps rehearse format wheel-check clean

setup: $(INSTALLED)

demo: setup
	$(BIN)/dyexport demo -o out/demo

check: lint
	$(PYTEST) -m "not build and not gpu and not slow"

test: lint
	$(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck

docs: setup  # seconds; fails at a dead link or anchor, and at a page that no menu shows
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: demo  # those of the documentation, in docs/figures: after a change of what they show
	$(BIN)/python docs/figures.py out/demo

bench: setup  # trains nothing, and names the models that are missing; the same command with --train-only trains them
	$(BIN)/python -m benchmarks.rivals --no-train

plans: setup  # FLUX's full width takes 6 GB, so one process: 10 minutes
	$(BIN)/python -m pytest -m "slow and tensorrt" tests/exporters tests/compilation

packages: setup  # needs g++; the rest of target torch runs in make test
	$(PYTEST) -m "slow and aot_inductor" tests/compilation tests/engines tests/bench

sweeps: setup  # what no other lane has
	$(PYTEST) -m "slow and not gpu and not tensorrt and not aot_inductor" --ignore tests/benchmarks tests

rehearse: setup
	$(PYTEST) -m "slow and not gpu" tests/benchmarks

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-check: setup
	.ci/wheel-check

clean:
	rm -rf build dist out site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	.ci/venv $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[build,cpu,demo,dev,docs,eval,report,rtx,triton]'
	.ci/triton-venv $(BIN)/python .triton
	touch $@
