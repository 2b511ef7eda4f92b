# Entry points on a fresh checkout: `make quickstart` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
OUT := out-quickstart

help:  ## show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/installed data/python_stdlib/train.bin  ## train a small GPT on Python's sources, sample, plot
	@echo "--- Training a small GPT on Python source code for one minute."
	@$(BIN)/python train.py config/quickstart.py --overwrite
	@echo "--- Generating 3 samples:"
	@$(BIN)/python sample.py --out_dir=$(OUT) --num_samples=3 --max_new_tokens=400
	@echo "--- Plotting the loss curves."
	@$(BIN)/python plot.py $(OUT)
	@echo "--- Done. To train on your own text, in five minutes: $(BIN)/nanogpt novel.txt"

data/python_stdlib/train.bin: | .venv/installed
	@echo "--- Preparing the dataset: the source code of Python's standard library."
	@$(BIN)/python data/python_stdlib/prepare.py

test: .venv/installed-dev  ## install the test dependencies if needed and run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

lint: .venv/installed-dev  ## run the linter, formatter check and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed  ## create the virtual environment .venv and install

.venv/installed: pyproject.toml constraints.txt
	@echo "--- Creating a virtual environment in .venv and installing (torch is large: can take minutes)."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "--- Installing the test dependencies."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove the virtual environment and caches; keep runs and data
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help quickstart test lint install clean
