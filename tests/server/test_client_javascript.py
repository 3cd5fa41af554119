"""JavaScript's clients, unmodified: the AI SDK through each provider, and the openai package.

The network's replies are scripted (see client_scripts); everything else is real.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_dgemma import Runtime

from .client_scripts import (
    CUT,
    CUT_AT,
    PICTURE_URL,
    PLACE,
    call,
    check_held,
    check_three_rounds,
    serving,
    three_rounds,
)
from .conftest import Script

NODE = Path(__file__).parent / "node"
OSLO = json.loads(PLACE)
PROVIDERS = ("compatible", "chat", "responses", "anthropic")
KINDS = (*PROVIDERS, "openai")

if shutil.which("node") is None:
    pytest.skip("node is not installed", allow_module_level=True)
if not (NODE / "node_modules" / "ai").is_dir():
    pytest.skip(f"run npm install --prefix {NODE}", allow_module_level=True)


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The address of a server of the demo model, whose structured replies nobody scripts."""
    with serving(Runtime()) as url:
        yield url


def outcome(url: str, kind: str, situation: str, *more: str) -> Any:
    done = subprocess.run(
        ["node", "client.mjs", kind, situation, url, *more],
        cwd=NODE, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def run(script: Script, kind: str, situation: str, *more: str) -> Any:
    with serving(script) as url:
        got = outcome(url, kind, situation, *more)
        if situation == "cancelled":
            assert script.cancelled.acquire(timeout=5)
    return got


@pytest.mark.parametrize("situation", ["loop", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_three_rounds(kind: str, situation: str) -> None:
    script = three_rounds()
    got = run(script, kind, situation)
    assert got["text"].endswith("All done.")
    check_three_rounds(script, got["asked"])


@pytest.mark.parametrize("kind", KINDS)
def test_structured_output(kind: str, demo: str) -> None:
    got = outcome(demo, kind, "output")
    assert {name: type(value) for name, value in got.items()} == {"city": str, "country": str}


@pytest.mark.parametrize("kind", PROVIDERS)
def test_structured_output_with_tools(kind: str) -> None:
    script = Script(call("one"), PLACE)
    assert run(script, kind, "outputWithTools") == {**OSLO, "asked": ["one"]}
    check_held(script, call("one"), PLACE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture(kind: str) -> None:
    script = Script("A dog.")
    assert run(script, kind, "picture", PICTURE_URL) == {"text": "A dog."}
    assert len(script.seen[0]["prompt"].images) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_too_long(kind: str) -> None:
    got = run(Script("ok"), kind, "long")
    assert got["status"] == 400
    assert "prompt is too long" in got["message"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_call(kind: str) -> None:
    got = run(Script(CUT), kind, "cut", str(CUT_AT))
    assert got == {"text": "I look.", "calls": 0, "reason": "length"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_stream(kind: str) -> None:
    assert run(Script("word " * 400, pause=0.05), kind, "cancelled") == {"left": True}
