"""Continuous integration must not turn green because an oracle was absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_TORCH = "tests/decoding/test_parity_generate.py"


@pytest.mark.parametrize(
    ("required", "status", "told"),
    [
        (True, pytest.ExitCode.USAGE_ERROR, "torch cannot be imported (No module named 'torch')"),
        (False, pytest.ExitCode.NO_TESTS_COLLECTED, "the oracle needs PyTorch"),
    ],
)
def test_an_absent_oracle_ends_the_run_only_where_it_is_required(
    tmp_path: Path, required: bool, status: int, told: str
) -> None:
    (tmp_path / "torch.py").write_text("""raise ModuleNotFoundError("No module named 'torch'")""")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("REQUIRE_ORACLES", None)
    if required:
        environment["REQUIRE_ORACLES"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", NEEDS_TORCH],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert told in done.stdout + done.stderr


def test_continuous_integration_requires_them() -> None:
    assert "REQUIRE_ORACLES=1" in (ROOT / ".ci" / "run").read_text()
