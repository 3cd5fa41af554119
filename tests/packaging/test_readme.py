"""README and docs/ are part of the program: blocks run, flags exist, links lead somewhere."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest

from mlx_dgemma.checkpoint.known_repositories import KNOWN_REPOSITORIES
from mlx_dgemma.cli.verbs import VERBS
from mlx_dgemma.convert.inspection import fit
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.machine.memory import gigabytes, usable
from mlx_dgemma.runtime import Runtime
from tests.server.test_clients import running

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCK = re.compile(
    r"(?:<!-- not run by the tests(?: here)?: (?P<why>.+?) -->\n)?"
    r"```(?P<language>\w+)\n(?P<body>.*?)```",
    re.DOTALL,
)
SERVER = "http://127.0.0.1:8080"
COMMAND = re.compile(r"mlx_dgemma\.([a-z]+)")


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    body: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.page}: {self.body.splitlines()[0][:40]}"


BLOCKS = [
    Block(page, found["language"], found["body"], found["why"])
    for page, text in PAGES.items()
    for found in BLOCK.finditer(text)
]
PYTHON = [block for block in BLOCKS if block.language == "python"]
LINES = [
    line
    for block in BLOCKS
    if block.language == "bash" and block.why_not is None
    # A backslash at its end joins a line to the next.
    for line in block.body.replace("\\\n", " ").splitlines()
]


def test_there_are_blocks_to_run() -> None:
    assert len(PYTHON) >= 6
    assert len(LINES) >= 12


def test_the_readme_names_every_page() -> None:
    missing = [page for page in PAGES if f"({page})" not in PAGES["README.md"]]
    assert missing == ["README.md"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    assert block.why_not is None
    with served(block.body) as body:
        exec(compile(body, block.page, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.strip()


@contextmanager
def served(body: str) -> Iterator[str]:
    """A block that asks the server of the lines before it asks one on a free port."""
    if SERVER not in body:
        yield body
        return
    with running(Runtime()) as url:
        yield body.replace(SERVER, url)


@pytest.mark.parametrize("line", LINES)
def test_shell_lines_run(line: str, tmp_path: Path) -> None:
    # What is installed is tested elsewhere; here each command runs from this checkout.
    line = COMMAND.sub(rf"{shlex.quote(sys.executable)} -m mlx_dgemma \1", line)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def parsers() -> dict[str, argparse.ArgumentParser]:
    modules = {verb: import_module(f"mlx_dgemma.cli.{verb}") for verb in VERBS}
    return {verb: m.build_parser() for verb, m in modules.items() if hasattr(m, "build_parser")}


def test_every_flag_on_the_page_exists() -> None:
    known = {flag for parser in parsers().values() for flag in parser._option_string_actions}
    convert = subprocess.run(
        [sys.executable, "-m", "mlx_dgemma", "convert", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    known |= set(re.findall(r"--[a-z-]+", convert))
    # The table of differences names flags of mlx-lm that are not here.
    text = "\n".join(PAGES.values()).replace("`--draft-model`", "")
    # What is not here, and other programs' lines; what mlx.launch starts is ours.
    others = (
        "none: this sampler",
        "lcb_runner",
        "mlx.distributed_config",
        "--backend jaccl",
        "--rehearse",
    )
    text = re.sub(r"mlx\.launch .*? -- ", "", text.replace("\\\n", " "))
    lines = (line for line in text.splitlines() if not any(words in line for words in others))
    page = "\n".join(lines)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    assert mentioned - known == set()


def test_every_decoding_flag_is_explained() -> None:
    flags = import_module("mlx_dgemma.cli.arguments")
    page = PAGES["docs/commands.md"]
    missing = [name for name in flags.SETTINGS if f"--{name.replace('_', '-')}" not in page]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", PAGES[page], flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", prose)
    assert [
        target for target in targets if not (ROOT / page).parent.joinpath(target).exists()
    ] == []


def test_the_table_of_repositories_is_the_programs() -> None:
    rows = re.findall(
        r"\| `(-\w+)` \| (~?[\d.]+ GB) \| (~?[\d.]+ GB) \| (\d+) GB \|", PAGES["docs/models.md"]
    )
    assert len(rows) >= 5
    known = {entry.id.split("-it")[-1]: entry for entry in KNOWN_REPOSITORIES}
    macs = [replace(machine(), memory=size << 30) for size in (16, 24, 32, 36, 48, 64, 96, 128)]
    for suffix, weights, memory, smallest in rows:
        entry = known[suffix]
        about = "" if entry.exact else "~"
        assert weights == about + gigabytes(entry.weight_bytes)
        assert memory == about + gigabytes(entry.memory_bytes)
        fitting = [mac for mac in macs if (usable(mac) or 0) >= entry.memory_bytes]
        assert (fitting[0].memory or 0) >> 30 == int(smallest)


def test_the_model_named_for_a_mac_fits_it_without_raising_a_limit() -> None:
    rows = re.findall(
        r"(?m)^\| (\d+ GB[^|]*) \| `([^`]+-it(-\w+))` \| ([^|]+) \|$", PAGES["README.md"]
    )
    assert len(rows) >= 5
    known = {entry.id: entry for entry in KNOWN_REPOSITORIES}
    for memory, name, _, about in rows:
        assert gigabytes(known[name].weight_bytes) in about
        for size in re.findall(r"(\d+) GB", memory):
            assert fit(int(size), known[name].memory_bytes).fits == "yes"


def test_the_size_of_the_demo_is_right() -> None:
    from mlx_dgemma.checkpoint.hub import demo_path
    from mlx_dgemma.checkpoint.sizes import stored_bytes

    stored = stored_bytes(demo_path())
    said = re.search(r"\(([\d.]+) million\nparameters, (\d+) MB\)", PAGES["docs/demo.md"])
    assert said is not None
    assert float(said[1]) == pytest.approx(stored / 2 / 1e6, abs=0.06)
    assert int(said[2]) == round(stored / 1e6)
