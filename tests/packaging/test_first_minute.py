"""The README's two commands, as a new user gives them: a clone in an empty folder, nothing set."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.packaging.test_distribution import committed

pytestmark = pytest.mark.slow
# Where this machine's packages come from; a reader's machine has its own.
MACHINE = (
    *("PATH", "PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT"),
    *("NPM_CONFIG_REGISTRY", "NODE_EXTRA_CA_CERTS"),
)
# A few tests of the emulator and of plain text, none of which runs this file again.
FEW = (
    "tests/msl/test_emulator.py tests/prompt/test_reply.py -k 'stop_string or wrapper_text or race'"
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first minute")  # the space is part of the test
    committed(folder / "clone")
    (folder / "home").mkdir()
    return folder / "clone"


def make(clone: Path, target: str, **more: str) -> str:
    kept = {name: os.environ[name] for name in MACHINE if name in os.environ}
    done = subprocess.run(
        ["make", target],
        cwd=clone,
        env={**kept, "HOME": str(clone.parent / "home"), "OMP_NUM_THREADS": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_make_demo_shows_the_model_at_work_and_then_at_once(clone: Path) -> None:
    said = make(clone, "demo")
    assert "-- making .venv" in said
    assert "-- installing this package" in said
    assert "checked: " in said.splitlines()[-1], said
    before = time.monotonic()
    assert "-- " not in make(clone, "demo")
    assert time.monotonic() - before < 60  # on a busy machine; nothing is installed


@pytest.mark.skipif(
    os.environ.get("CI") == "true",
    reason=".ci/run fills a clean clone and runs make test in it: this would be the same again",
)
def test_make_test_runs_the_tests(clone: Path) -> None:
    said = make(clone, "test", PYTEST_ADDOPTS=FEW, JOBS="1")
    assert "the emulator's compiler" in said
    assert " passed" in said.splitlines()[-1]
    assert "failed" not in said
    again = make(clone, "test", PYTEST_ADDOPTS=FEW, JOBS="1")
    assert "installing" not in again
