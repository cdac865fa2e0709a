# Two commands from a fresh clone: `make quickstart` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: install quickstart test check clean

install: .venv/installed

quickstart: .venv/installed
	$(BIN)/relora prepare corpus --out prepared/quickstart --train-tokenizer 4096 --validation 3%
	$(BIN)/relora pretrain configs/quickstart.yaml
	$(BIN)/relora generate runs/quickstart --prompt "The old house" --max-new-tokens 80 --temperature 0.7
	@echo
	@echo "Open runs/quickstart/report.html in a browser. Then try:"
	@echo "  $(BIN)/relora evaluate runs/quickstart --data prepared/quickstart/validation   # the perplexity the run ended with"
	@echo "  $(BIN)/relora pretrain configs/quickstart.yaml method=lora output_dir=runs/lora"
	@echo "  $(BIN)/relora prepare YOUR_TEXTS/ --out prepared/mine --train-tokenizer 8192"

test: check
	$(BIN)/python -m pytest -n 2

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What a user needs. torch comes first and by its exact version: a range lets pip take a build of several GB.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) torch
	$(PIP) --editable .
	touch $@

# The tools of development, and every optional library that a test uses.
.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
