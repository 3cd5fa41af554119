"""Two tokenizers: the demo's, always there, and the real one where its files are at hand."""

import functools
import os
from pathlib import Path

import pytest

from mlx_dgemma.prompt.tokenizer import Tokenizer, load_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "mlx_dgemma" / "demo" / "checkpoint"
ASSETS = ROOT.parent / "shared" / "assets"
REAL = ASSETS / "checkpoint-4bit"
STOP_IDS = {DEMO: (1, 16, 9), REAL: (1, 106, 50)}


@functools.cache
def _load(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, STOP_IDS[folder])


def _real_folder() -> Path:
    if not (REAL / "tokenizer.json").is_file():
        pytest.skip(f"the published checkpoint's tokenizer is not at {REAL}")
    return REAL


@pytest.fixture(params=["demo", "real"])
def folder(request: pytest.FixtureRequest) -> Path:
    return DEMO if request.param == "demo" else _real_folder()


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return _load(folder)


@pytest.fixture
def demo() -> Tokenizer:
    return _load(DEMO)


@pytest.fixture
def real() -> Tokenizer:
    return _load(_real_folder())
