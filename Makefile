# make quickstart   installs into .venv, then compresses the small model that llmpress ships
# make test         the core suite, what CI runs
# make test-extras  optional backends      make lint  ruff, mypy, import contracts
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-extras lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "llmpress needs Python 3.11 to 3.13"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/run recipe=quickstart

test: install
	@echo 'left out: tests marked gpu (they need an accelerator) and extras (make test-extras: isolated environments, GGUF, Ray)'
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not extras"  # two workers: the suite is made for two cores
	$(BIN)/lint-imports --no-cache

test-extras: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'  # builds llama.cpp once, 8 CPU minutes; pip keeps it
	$(BIN)/python -m pytest -m extras

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
