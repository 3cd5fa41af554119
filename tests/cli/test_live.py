"""The live view on terminals of several sizes, from events made by hand."""

from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console
from rich.text import Text

from mlx_dgemma.cli.draft_view import Pieces
from mlx_dgemma.cli.live import LiveView, fit
from mlx_dgemma.decoding.events import Commit
from tests.cli.fakes import STOP, decode, draft, finish, settled

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def terminal(width: int = 80, height: int = 24) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    console = Console(
        file=stream,
        force_terminal=True,
        color_system=None,
        width=width,
        height=height,
        legacy_windows=False,
    )
    return console, stream


def view(console: Console, **options: float) -> LiveView:
    return LiveView(console, Pieces(decode), {STOP}, max_denoising_steps=48, **options)


def screen(output: str, width: int = 80) -> list[str]:
    """The lines a terminal shows after `output`, by the few control codes that rich sends."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", output):
        if part == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        elif part == "\r":
            column = 0
        elif part.endswith("A"):
            row -= int(part[2:-1] or 1)
            assert row >= 0, "the view moved above its first line"
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part
            column += len(part)
            assert column <= width, f"a line is wider than {width}: {part!r}"
    return [line.rstrip() for line in lines]


def test_drafts_redraw_in_place_and_the_text_remains() -> None:
    console, stream = terminal()
    with view(console) as live:
        live.show(draft([1, 2, 3, STOP], [True, False, False, True], [0, 0.4, 5, 0], step=1))
        live.settle()
        before = screen(stream.getvalue())
        live.show(settled([1, 2, 3, STOP], step=2))
        live.show(Commit(ids=(1, 2, 3), text="The fox jumps", block=0))
        live.show(finish())
    assert before[0] == "The fox ░░░░░"
    assert before[-1].startswith("step 1 of 48 · 2 of 4 accepted · entropy 1.35")
    after = [line for line in screen(stream.getvalue()) if line]
    assert after == ["The fox jumps"]


def test_the_cursor_comes_back_after_success_and_after_an_error() -> None:
    console, stream = terminal()

    def interrupted() -> None:
        with view(console) as live:
            live.show(settled([1, 2]))
            live.show(Commit(ids=(1, 2), text="The fox", block=0))
            live.show(settled([3, 4], block=1))
            live.settle()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    output = stream.getvalue()
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)
    assert [line for line in screen(output) if line] == ["The fox"]


def test_committed_text_stands_before_the_next_draft() -> None:
    console, stream = terminal()
    with view(console) as live:
        live.show(Commit(ids=(1, 2), text="The fox", block=0))
        live.show(settled([3, 4], block=1))
        live.settle()
        assert screen(stream.getvalue())[0] == "The fox jumps over"


@pytest.mark.parametrize("width", [1, 7, 20, 40, 80])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    console, stream = terminal(width=width)
    with view(console) as live:
        for step in range(1, 4):
            live.show(draft([1, 2, 3, 4, 5, 6, 7] * 6, [False] * 42, [0.5] * 42, step=step))
            live.settle()
        screen(stream.getvalue(), width)


def test_a_canvas_taller_than_the_terminal_shows_its_end() -> None:
    console, stream = terminal(width=20, height=8)
    with view(console) as live:
        live.show(settled([1, 8] * 30 + [2]))
        live.settle()
        lines = screen(stream.getvalue(), 20)
    assert len(lines) <= 8
    assert lines[-1].startswith("step 1 of 48")


def test_long_replies_scroll_by_paragraphs_and_lose_nothing() -> None:
    console, stream = terminal(height=10)
    text = "".join(f"paragraph {i}\n" for i in range(40)) + "the end"
    with view(console) as live:
        for block in range(5):
            live.show(settled([1, 2, 3], block=block))
            live.show(Commit(ids=(1,), text=text[block * 110 : (block + 1) * 110], block=block))
    shown = [line for line in screen(stream.getvalue()) if line]
    assert shown == text[:550].split("\n")


def test_the_region_never_shrinks_while_a_canvas_resolves() -> None:
    console, stream = terminal()
    with view(console) as live:
        live.show(settled([1, 8, 2, 8, 3]))
        live.settle()
        tall = len(screen(stream.getvalue()))
        live.show(settled([1, STOP, 2, 8, 3], step=2))
        live.settle()
        assert len(screen(stream.getvalue())) == tall


def test_thinking_is_headed_and_apart_from_the_answer() -> None:
    console, stream = terminal()
    with view(console) as live:
        live.show(Commit(ids=(1,), text="", block=0, thinking="hm"))
        live.show(Commit(ids=(2,), text="The fox", block=1))
    assert screen(stream.getvalue())[:4] == ["thinking", "hm", "", "The fox"]


def test_tool_calls_are_shown_as_calls() -> None:
    console, stream = terminal()
    call = {"name": "get_time", "arguments": {"city": "Oslo", "hours": 12}}
    with view(console) as live:
        live.show(Commit(ids=(1,), text="", block=0, tool_calls=(call,)))
    assert '→ get_time(city="Oslo", hours=12)' in screen(stream.getvalue())


def test_a_step_does_not_wait_for_the_one_before_to_be_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However slow the terminal: the newest draft is drawn when it is ready for one."""
    console, stream = terminal()
    with view(console) as live:
        drawn, free, begun = [], threading.Event(), threading.Event()
        frame = live.frame

        def slow() -> Text:
            begun.set()
            assert free.wait(10)
            shown = frame()
            drawn.append(shown.plain.splitlines()[-1].split(" of ")[0])
            return shown

        monkeypatch.setattr(live, "frame", slow)
        live.show(settled([1, 2], step=1))
        assert begun.wait(10)
        for step in range(2, 9):  # would never return if they waited
            live.show(settled([1, 2], step=step))
        free.set()
        live.settle()
        assert drawn == ["step 1", "step 8"]
        live.show(settled([1, 2], step=9))
        live.show(Commit(ids=(1, 2), text="The fox", block=0))
    assert [line for line in screen(stream.getvalue()) if line] == ["The fox"]


@pytest.mark.parametrize("failure", [OSError("gone"), SystemExit(1)])  # rich's for a broken pipe
def test_a_terminal_that_is_gone_ends_the_reply(
    monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    console, _ = terminal()

    def gone() -> Text:
        raise failure

    def shown() -> None:
        with view(console) as live:
            monkeypatch.setattr(live, "frame", gone)
            live.show(settled([1, 2]))
            live.settle()

    with pytest.raises(type(failure)):
        shown()


class Clock:
    """In place of the module `time`: it passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("mlx_dgemma.cli.live.time", clock)
    return clock


def test_pace_is_kept_and_counted(clock: Clock) -> None:
    console, _ = terminal()
    with view(console, pace=0.5) as live:
        for step in range(1, 5):
            live.show(settled([1], step=step))
            clock.now += 0.125  # the model's own time
    assert clock.now == 100 + 3 * 0.5 + 0.125
    assert live.held_seconds == 3 * (0.5 - 0.125)


def test_the_pause_before_a_commit_is_outside_the_measured_time(clock: Clock) -> None:
    """The block's time is taken when its Commit comes, before the view waits to show it."""
    console, _ = terminal()
    with view(console, pace=0.5) as live:
        live.show(settled([1]))
        live.show(Commit(ids=(1,), text="The", block=0))
    assert clock.now == 100.5
    assert live.held_seconds == 0


@pytest.mark.parametrize(
    ("width", "line"), [(80, "one · two · three"), (12, "one · two"), (5, "one"), (2, "on")]
)
def test_the_status_line_keeps_what_matters(width: int, line: str) -> None:
    assert fit(["one", "two", "three"], width) == line
