.PHONY: install format lint types test test-fast check build clean

# PyTorch is only an oracle of the tests. On Linux PyPI's build brings gigabytes of CUDA libraries;
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu offers the CPU build of this version.
install:
	python -m pip install torch==2.13.0
	python -m pip install -e '.[dev,server,clients]'
	if command -v npm >/dev/null; then npm install --silent --prefix tests/server/node; fi

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	mypy

test:
	python -m pytest

test-fast:
	python -m pytest -m 'not slow'

check: lint types test

build:
	python -m build

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
