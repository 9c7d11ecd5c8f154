# Everything a person or CI needs; each target sets up .venv first.
#   make demo   trains, builds and samples a small model
#   make check  lint, types and the tests that build nothing
#   make test   everything that a machine without a GPU can test
#   make docs   the documentation site, in site/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := time -p $(BIN)/python -m pytest -n 2 --dist worksteal --durations=20
SHELL := /bin/bash
INSTALLED := $(VENV)/.installed

.PHONY: setup demo check test lint docs figures plans packages format wheel-check clean

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

plans: setup  # every TensorRT-RTX plan the tests know, FLUX's full width among them: 10 minutes, 6 GB
	$(BIN)/python -m pytest -m "tensorrt and slow" tests/exporters

packages: setup  # target torch of every backbone, in fp32 and bf16, against the masked model: 10 minutes
	$(PYTEST) -m slow tests/compilation/test_aot_inductor.py -k test_every_backbone

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
