# The two commands that set up a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
OUT := out-quickstart

help:  ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/installed data/python_stdlib/train.bin  ## train a small GPT on Python's own sources, sample, plot
	@echo "--- Training a small GPT to write Python: about a minute on two cores."
	@$(BIN)/python train.py config/quickstart.py --overwrite
	@echo "--- Three samples of what it has learnt:"
	@$(BIN)/python sample.py --out_dir=$(OUT) --num_samples=3 --max_new_tokens=400
	@echo "--- Drawing its loss curve."
	@$(BIN)/python plot.py $(OUT)
	@echo "--- Done. Your own text: $(BIN)/python data/prepare.py PATH --out=data/mine, then"
	@echo "    $(BIN)/python train.py config/quickstart.py --dataset=data/mine --out_dir=out-mine"

data/python_stdlib/train.bin: | .venv/installed
	@echo "--- Preparing the text: the sources of this Python's standard library."
	@$(BIN)/python data/python_stdlib/prepare.py

test: .venv/installed-dev  ## set up what is missing and run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

lint: .venv/installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed  ## make the virtual environment .venv

.venv/installed: pyproject.toml constraints.txt
	@echo "--- Making a virtual environment in .venv and installing; torch is large, so this can take minutes."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "--- Installing what the tests need."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove the virtual environment and caches; runs and data stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help quickstart test lint install clean
