"""Every example runs as its first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENDINGS = {
    "generate.py": "",
    "stream_drafts.py": "tokens per forward",
    "app_worker.py": "cancelled after",
    "image.py": "A red circle at the top left.",
}


def test_all_examples_are_listed() -> None:
    # desktop/ needs a display: tests/server/test_window.py
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(ENDINGS)


@pytest.mark.parametrize("name", ENDINGS)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert ENDINGS[name] in done.stdout


def test_the_picture_is_drawn_from_a_run(tmp_path: Path) -> None:
    picture = tmp_path / "canvas.svg"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/media/record.py"), "--output", str(picture)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "answer" in done.stdout
    drawn = picture.read_text()
    assert "committed" in drawn.replace("&#160;", " ")
    assert "url(http" not in drawn
