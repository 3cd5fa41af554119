.PHONY: install format lint types test test-fast check build clean

# PyTorch is only an oracle of the tests; on Linux its CPU build is enough, and asking for it
# by version first keeps pip from choosing a build with gigabytes of CUDA libraries.
install:
	python -m pip install torch==2.13.0
	python -m pip install -e '.[dev,server]'

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
