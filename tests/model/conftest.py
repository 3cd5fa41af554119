"""Random checkpoints shared by the tests of this folder, and the way to the oracles."""

import sys
from pathlib import Path

import pytest

ORACLES = str(Path(__file__).parents[1] / "oracles")
if ORACLES not in sys.path:
    sys.path.insert(0, ORACLES)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random checkpoint folder in Hugging Face's layout and the published dialect."""
    from random_checkpoint import write

    return write(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def reference(checkpoint):
    from transformers_oracle import Reference

    return Reference(checkpoint)


@pytest.fixture(scope="session")
def model(checkpoint):
    from mlx_dgemma.checkpoint.weights import load_model

    return load_model(checkpoint)
