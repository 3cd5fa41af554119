"""The desktop window of examples/, on a virtual display: it asks, draws, stops, and closes."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mlx_dgemma.runtime import Runtime

tkinter = pytest.importorskip("tkinter", reason="this Python was built without tkinter")
EXAMPLE = Path(__file__).parents[2] / "examples/desktop/canvas_app/__main__.py"
PATIENCE = 120.0
# Tcl aborts the process when a root is freed on another thread than its own, and the collector may
# run on any: so none is freed.
ROOTS: list[Any] = []


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> None:
    """A display of its own, or the one there is.

    It ends with its last client: Tk keeps its connection to the end of the process, and a
    display that goes before would take the process with it.
    """
    server = shutil.which("Xvfb")
    if server is None:
        if os.name == "posix" and sys.platform != "darwin" and not os.environ.get("DISPLAY"):
            pytest.skip("there is no display and no Xvfb to make one: sudo apt-get install xvfb")
        return
    reading, writing = os.pipe()
    command = [server, "-displayfd", str(writing), "-screen", "0", "800x600x24"]
    subprocess.Popen(
        [*command, "-nolisten", "tcp", "-terminate"],
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with os.fdopen(reading) as number:
        monkeypatch.setenv("DISPLAY", f":{number.readline().strip()}")


@pytest.fixture
def window(display: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(import_module("mlx_dgemma.generate"), "fresh_seed", lambda: 1)
    spec = importlib.util.spec_from_file_location("window", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with Runtime() as runtime:
        root = tkinter.Tk()
        ROOTS.append(root)
        yield module.Window(root, runtime)
        root.destroy()


def until(window: Any, done: Callable[[], bool]) -> None:
    """Runs the window's own loop until something has happened."""
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, window.status["text"]
        window.root.update()
        time.sleep(0.01)


def test_it_fills_the_holes_of_a_line(window: Any) -> None:
    window.entry.delete(0, "end")
    window.entry.insert(0, "the small cat <hole:1> the dog in the garden.")
    window.button.invoke()
    until(window, lambda: window.cancel is None)
    before, after = "the small cat ", " the dog in the garden."
    assert window.answer.startswith(before)
    assert window.answer.endswith(after)
    assert len(window.answer) > len(before + after)
    assert window.text.get("1.0", "end-1c") == window.answer
    assert window.status["text"].startswith("filled: seed ")
    window.entry.delete(0, "end")
    window.entry.insert(0, "a <hole:0> b")
    window.button.invoke()
    until(window, lambda: window.cancel is None)
    assert "<hole" in window.status["text"]


def test_it_draws_the_canvas_and_can_be_stopped(window: Any) -> None:
    seen: set[str] = set()
    drawn = window.draw
    window.draw = lambda draft="", tag="": (seen.add(tag), drawn(draft, tag))
    window.button.invoke()
    assert window.button["text"] == "Stop"
    until(window, lambda: window.cancel is None)
    assert window.button["text"] == "Ask"
    assert window.status["text"].startswith("stop: seed ")
    assert window.text.get("1.0", "end-1c") == window.answer != ""
    assert "" in seen  # a commit
    assert len(seen) > 1  # and drafts

    window.entry.delete(0, "end")
    window.button.invoke()
    until(window, lambda: window.cancel is None)
    assert "The prompt is empty" in window.status["text"]
    window.entry.insert(0, "Count from 10 to 99.")
    window.button.invoke()
    window.button.invoke()
    until(window, lambda: window.cancel is None)
    assert window.status["text"].startswith("cancelled")


@pytest.mark.parametrize(("model", "said"), [("/no/model", "/no/model"), ("", "no window")])
def test_a_start_that_fails_is_a_sentence(
    display: None, monkeypatch: pytest.MonkeyPatch, model: str, said: str
) -> None:
    if not model and (sys.platform == "darwin" or os.name != "posix"):
        pytest.skip("only X11 can be without a display")
    if not model:
        monkeypatch.delenv("DISPLAY")
    command = [sys.executable, str(EXAMPLE), "--close", *(["--model", model] if model else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("canvas_app: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
