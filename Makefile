# make demo and make test need Python 3.11 to 3.13 and nothing else: each fills .venv first, and says
# what it does. A second call finds it filled and starts at once.
.PHONY: demo test test-fast install format lint types check build clean

VENV ?= .venv
# The first of these that this package runs on.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo "$$python" && break; done)
BIN := $(VENV)/bin
# Processes that pytest runs in: one per core, or make test JOBS=2. What one file builds once stays
# with one of them.
JOBS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=25

demo: $(VENV)/for-demo
	@$(BIN)/python -m mlx_dgemma generate

test: $(VENV)/for-tests
	@$(PYTEST)

test-fast: $(VENV)/for-tests
	@$(PYTEST) -m 'not slow'

install: $(VENV)/for-tests

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11, 3.12 or 3.13 is needed: none is on the path."; exit 1; fi
	@echo "-- making $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
	echo "-- this Python cannot make a virtual environment; on Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }

# Filled again when what it holds is changed.
$(VENV)/for-demo: pyproject.toml .ci/prepare.py | $(BIN)/python
	@$(BIN)/python .ci/prepare.py demo
	@touch $@

$(VENV)/for-tests: pyproject.toml .ci/prepare.py | $(BIN)/python
	@$(BIN)/python .ci/prepare.py test
	@touch $@ $(VENV)/for-demo

format: $(VENV)/for-tests
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

lint: $(VENV)/for-tests
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

types: $(VENV)/for-tests
	$(BIN)/python -m mypy

check: lint types test

build: $(VENV)/for-tests
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
