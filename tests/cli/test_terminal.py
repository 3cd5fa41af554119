"""The commands on a real pseudo-terminal: drawing, Ctrl-C, and what the terminal is left with."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")

ENDLESS = ["--max-denoising-steps", "10000", "--confidence-threshold", "0", "--pace", "0.01"]
ENDLESS += ["--seed", "1"]
CODES = re.compile(r"\x1b\[\??[\d;]*[A-Za-z]")


class Terminal:
    """A command on a pseudo-terminal; `messages` takes what it says on standard error."""

    def __init__(
        self,
        *arguments: str,
        size: tuple[int, int] = (24, 80),
        messages: int | None = None,
        **environment: str,
    ) -> None:
        self.master, slave = pty.openpty()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        termios.tcsetwinsize(slave, size)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_dgemma", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave if messages is None else messages,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **environment},
        )
        self.output = ""

    def wait_for(self, text: str, times: int = 1, start: int = 0, seconds: float = 90) -> None:
        """Reads until the text stands that often in the output from `start` on."""
        end = time.monotonic() + seconds
        while CODES.sub("", self.output[start:]).count(text) < times:
            assert time.monotonic() < end, f"no {text!r} in {self.output!r}"
            assert self.read() or self.process.poll() is None, f"it ended: {self.output!r}"

    def read(self) -> bool:
        ready, _, _ = select.select([self.master], [], [], 0.1)
        if ready:
            # A read may end inside a character.
            self.output += self._decoder.decode(os.read(self.master, 65536))
        return bool(ready)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def finish(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still running: {self.output!r}"
            self.read()
        while self.read():
            pass
        after = termios.tcgetattr(self.slave)
        os.close(self.slave)
        os.close(self.master)
        assert after == self.before, "the terminal's settings changed"
        return self.process.returncode

    def leave(self) -> int:
        """Ctrl-D until it is heard: one that comes between two prompts is lost."""
        for _ in range(30):
            if self.process.poll() is not None:
                break
            self.type("\x04")
            for _ in range(20):
                self.read()
        return self.finish()

    @property
    def text(self) -> str:
        return CODES.sub("", self.output)


def test_the_canvas_is_drawn_and_the_figures_follow() -> None:
    terminal = Terminal("generate", "--seed", "5", "--max-denoising-steps", "4", "--pace", "0")
    assert terminal.finish() == 0
    assert "step 1 of 4" in terminal.text
    assert "tokens per forward" in terminal.text
    assert "checked: " in terminal.text
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


def test_without_colour_nothing_is_coloured() -> None:
    terminal = Terminal(
        "generate", "-p", "abc", "--seed", "1", "--max-denoising-steps", "2", NO_COLOR="1"
    )
    assert terminal.finish() == 0
    colours = [code for code in CODES.findall(terminal.output) if re.search(r"[34]\d", code)]
    assert colours == []


def test_a_dumb_terminal_gets_plain_text() -> None:
    terminal = Terminal(
        "generate", "-p", "abc", "--seed", "1", "--max-denoising-steps", "2", TERM="dumb"
    )
    assert terminal.finish() == 0
    assert "\x1b" not in terminal.output


def test_ctrl_c_ends_a_reply_cleanly() -> None:
    terminal = Terminal("generate", "-p", "abc", *ENDLESS)
    terminal.wait_for("step ", times=3)
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.finish() == 130
    assert "cancelled" in terminal.text
    assert "Traceback" not in terminal.text
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


def test_a_request_to_end_leaves_the_terminal_as_it_was() -> None:
    terminal = Terminal("generate", "-p", "abc", *ENDLESS)
    terminal.wait_for("step ", times=3)
    os.kill(terminal.process.pid, signal.SIGTERM)
    assert terminal.finish() == 130
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


def test_a_terminal_that_goes_away_ends_the_reply_in_words(tmp_path: Path) -> None:
    with (tmp_path / "messages").open("w+") as messages:
        terminal = Terminal(
            *("generate", "-p", "abc", "--seed", "1", "--pace", "0.1"), messages=messages.fileno()
        )
        terminal.wait_for("step ", times=1)
        os.close(terminal.slave)
        os.close(terminal.master)
        assert terminal.process.wait(60) == 2
        messages.seek(0)
        said = messages.read().splitlines()
    assert said[-1] == "error: The terminal is gone, or a disk cannot be read."
    assert not any("Traceback" in line for line in said)


@pytest.mark.parametrize("sizes", [[(1, 1)], [(0, 0)], [(24, 80), (3, 5), (1, 1), (60, 300)]])
def test_a_terminal_of_any_size_is_drawn_on(sizes: list[tuple[int, int]]) -> None:
    terminal = Terminal(
        "generate", "-p", "abc", "--seed", "1", "--max-tokens", "32", "--pace", "0.1", size=sizes[0]
    )
    for size in sizes[1:]:
        terminal.read()
        time.sleep(0.2)
        if terminal.process.poll() is None:
            termios.tcsetwinsize(terminal.slave, size)
            os.kill(terminal.process.pid, signal.SIGWINCH)
    assert terminal.finish() == 0
    assert "Traceback" not in terminal.text


def test_typing_ahead_does_not_disturb_the_drawing() -> None:
    terminal = Terminal("chat", *ENDLESS)
    terminal.wait_for("› ")
    terminal.type("hello\n")
    terminal.wait_for("step ", times=3)
    terminal.type("/seed 4\n")
    seen = len(terminal.output)
    terminal.wait_for("step ", times=5, start=seen)  # a busy machine leaves out frames
    assert "/seed" not in terminal.output[seen:]
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("Every reply uses seed 4.")
    assert terminal.leave() == 0


def test_ctrl_c_in_a_chat_ends_the_reply_and_not_the_chat() -> None:
    terminal = Terminal("chat", *ENDLESS)
    terminal.wait_for("› ")
    terminal.type("hello\n")
    terminal.wait_for("step ", times=3)
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("cancelled")
    terminal.type("/seed 4\n")
    terminal.wait_for("Every reply uses seed 4.")
    assert terminal.leave() == 0
    assert "Traceback" not in terminal.text
