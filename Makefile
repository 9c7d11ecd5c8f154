# Everything a person or CI needs: `make demo` runs the main job, `make test` checks the code. Both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test lint unit plans format wheel-check clean

setup: $(INSTALLED)

demo: setup
	$(BIN)/dyexport demo -o out/demo

test: lint unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck

unit: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

plans: setup  # every TensorRT-RTX plan the tests know, FLUX's full width among them: 10 minutes, 6 GB
	$(BIN)/python -m pytest -m "tensorrt and slow" tests/exporters

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-check: setup
	.ci/wheel-check

clean:
	rm -rf build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	.ci/venv $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[build,cpu,demo,dev,rtx,triton]'
	.ci/triton-venv $(BIN)/python .triton
	touch $@
