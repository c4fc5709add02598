# make quickstart   installs into .venv, then compresses the small model that llmpress ships
# make test         the core suite, one case of each kind: what CI runs, minutes
# make test-slow    the other cases        make test-extras  optional backends
# make test-gpu     on a machine with an NVIDIA card, docs/gpu.md; make gpu-bundle packs it for one without network
# make lint         ruff, mypy, import contracts
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-slow test-extras test-gpu gpu-bundle lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "llmpress needs Python 3.11 to 3.13"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/run recipe=quickstart

# Two workers, as the suite is made for two cores; what is left out needs more than this machine has, or is one more case of a kind.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
HERE := not gpu and not extras and not engines

test: install
	@echo 'left out: slow (make test-slow), extras (make test-extras: isolated environments, GGUF, Ray), engines, gpu (an accelerator)'
	$(PYTEST) -m "$(HERE) and not slow"
	$(BIN)/lint-imports --no-cache

test-slow: install
	$(PYTEST) -m "$(HERE) and slow"

test-extras: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'  # builds llama.cpp once, 8 CPU minutes; pip keeps it
	$(BIN)/python -m pytest -m extras

DEVICE ?= cuda

test-gpu: install  # DEVICE=cpu rehearses the rows without a card
	$(BIN)/python -m tests.gpu.measure --json outputs/gpu.json --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--model tiny)
	$(if $(filter cuda,$(DEVICE)),$(BIN)/python -m pytest -m gpu)

gpu-bundle: install
	$(BIN)/python -m tests.gpu.bundle

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
