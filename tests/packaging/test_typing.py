"""A user's program passes `mypy --strict` against the installed package; mistakes do not.

The types of its dependencies are left out: they take mypy most of a minute.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

import mlx_dgemma

pytest.importorskip("mypy", reason="mypy: pip install -e '.[dev]'")

PROGRAM = """
import asyncio
import threading

from mlx_dgemma import (
    Commit, Constraint, Decision, Draft, Event, Finish, Infill, Noul, PromptCache, Runtime, decide,
    generate, infill, load, stream_generate,
)
from mlx_dgemma.scoring import prompt_scores


def told(event: Event) -> str:
    if isinstance(event, Draft):
        return f"{event.draft_text} {event.entropy.mean():.2f}"
    if isinstance(event, Commit):
        return event.text + str([id_ + 1 for id_ in event.ids])
    return f"{event.reason} {event.tokens_per_forward:.1f}"


def alone() -> int:
    model, tokenizer = load()
    cache = PromptCache(model)
    text: str = generate(model, tokenizer, "Hi", seed=1, max_tokens=8)
    for event in stream_generate(
        model, tokenizer, [{"role": "user", "content": text}], drafts=True, cache=cache,
        constraint=Constraint.choice(["yes", "no"]), preset="reference",
    ):
        print(told(event))
    filled: Infill = infill(model, tokenizer, "a <hole:1> b", n=2)
    answers: Decision = decide(model, tokenizer, "state", {"is_it": Noul("Is it?")})
    scores: float = float(prompt_scores(model, [2, 5]).logprobs.sum())
    return len(filled.text) + answers.forwards + int(scores)


async def served(runtime: Runtime, cancel: threading.Event) -> Finish | None:
    last: Finish | None = None
    async for event in runtime.astream("Hi", cancel=cancel, temp=0.5, kv_bits=8):
        if isinstance(event, Finish):
            last = event
    return last


def main() -> None:
    with Runtime("demo", kv_bits=None) as runtime:
        finish = asyncio.run(served(runtime, threading.Event()))
        print(finish.seed if finish is not None else 0, runtime.generate("Hi"))
        size: int = runtime.call(lambda: len(runtime.tokenizer))
        print(size)
"""
MISTAKES = (
    ("kv_bits=None)", 'kv_bits="8")', 'Argument "kv_bits" to "Runtime"'),
    ("size: int =", "size: str =", 'expression has type "int"'),
    ("temp=0.5", "temperature=0.5", 'Unexpected keyword argument "temperature"'),
    ("event.draft_text", "event.drafted", '"Draft" has no attribute "drafted"'),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the package among its own."""
    folder = tmp_path_factory.mktemp("typed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "mlx_dgemma").symlink_to(Path(mlx_dgemma.__file__).parent)
    return folder


def checked(site: Path, program: str) -> subprocess.CompletedProcess[str]:
    path = site.parent / "program.py"
    path.write_text(program)
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", site / "bin" / "python",
         "--cache-dir", site.parent / "cache", path],
        cwd=site.parent, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_user_s_program_is_typed_throughout(site: Path) -> None:
    done = checked(site, PROGRAM)
    assert done.returncode == 0, done.stdout


def test_mistakes_are_found(site: Path) -> None:
    program = PROGRAM
    for right, wrong, _ in MISTAKES:
        assert right in program
        program = program.replace(right, wrong)
    done = checked(site, program)
    assert done.returncode == 1
    assert all(said in done.stdout for _, _, said in MISTAKES), done.stdout
