"""What CI's preparation does about missing system parts, with an apt-get that only writes down."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
APT = """#!/bin/sh
echo "$DEBIAN_FRONTEND $@" >> {folder}/log
{fails}
case "$*" in *install*) for part in {parts}; do
  printf '#!/bin/sh\\n' > {folder}/$part; chmod +x {folder}/$part
done;; esac
"""
Prepared = Callable[..., tuple[list[str], str]]


@pytest.fixture
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", ROOT / ".ci" / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prepared(
    prepare: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Prepared:
    """prepared(parts, fails, root) -> (apt-get's calls, what was said), where PATH has nothing
    but an apt-get that "installs" these parts."""

    def run(
        parts: str = "chromium Xvfb", fails: str = "", root: bool = True
    ) -> tuple[list[str], str]:
        apt = tmp_path / "apt-get"
        apt.write_text(APT.format(folder=tmp_path, parts=parts, fails=fails))
        apt.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
        for tool in ("printf", "chmod"):  # printf is the shell's own; chmod is a program
            real = Path("/bin") / tool
            if real.exists() and not (tmp_path / tool).exists():
                (tmp_path / tool).symlink_to(real)
        monkeypatch.delenv("DISPLAY", raising=False)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(prepare.os, "geteuid", lambda: 0 if root else 1000)
        monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name == "tkinter")
        prepare.system_parts()
        log = tmp_path / "log"
        calls = log.read_text().splitlines() if log.exists() else []
        return calls, capsys.readouterr().out

    return run


def test_root_installs_what_is_missing(prepared: Prepared) -> None:
    calls, said = prepared()
    update, install = calls
    assert update == "noninteractive -qq -o Acquire::Retries=1 update"
    assert install.endswith("install -y --no-install-recommends chromium xvfb")
    assert said == "-- installing chromium and xvfb with apt-get\n"
    again, said = prepared()
    assert (again, said) == (calls, "")  # both are there: nothing is asked and nothing is said


def test_what_apt_could_not_install_is_skipped_in_words(prepared: Prepared) -> None:
    calls, said = prepared(parts="chromium")
    assert len(calls) == 2
    assert "the tests of the server's page" not in said
    assert "the tests of the example window will be skipped" in said
    assert said.rstrip().endswith("sudo apt-get install xvfb")


def test_an_apt_that_fails_ends_nothing(prepared: Prepared) -> None:
    calls, said = prepared(fails="exit 100")
    assert len(calls) == 2
    assert said.count("will be skipped; to run them: sudo apt-get install") == 2


def test_no_one_but_root_calls_apt(prepared: Prepared) -> None:
    calls, said = prepared(root=False)
    assert calls == []
    assert said.count("will be skipped; to run them: sudo apt-get install") == 2
