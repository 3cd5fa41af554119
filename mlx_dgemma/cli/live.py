"""The live view of one reply: the canvas sharpens in place, committed text scrolls away above it.

    committed text, plain; then the draft of the current canvas
    one bar per canvas position
    block 1 · step 4 of 48 · 31 of 48 accepted · entropy 0.42

Only the region of the current canvas is redrawn, in one write and in a thread of its own: a step
that comes while the one before is drawn does not wait, and the device goes on.
When the reply is over the region is erased and the text stands there as if it had been printed
in one go, so that it can be scrolled to and copied.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Collection
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mlx_dgemma.cli.draft_view import THINKING, Pieces, bars, paint, printable
from mlx_dgemma.decoding.events import Commit, Draft, Event

SEPARATOR = " · "
BARS_AND_STATUS = 3  # lines under the text: a blank one, the bars, the status


class LiveView:
    """Shows Draft and Commit events on a terminal; use as a context manager.

    pieces: the text of single ids. stop_ids: where a draft ends.
    max_denoising_steps: for "step 4 of 48".
    pace: seconds that every step stays on the screen at least.
    held_seconds: how long the view has slept between steps to keep that pace. The pause that a
        commit waits for comes after the time of its block was taken, so it is not in there.
    """

    def __init__(
        self,
        console: Console,
        pieces: Pieces,
        stop_ids: Collection[int],
        *,
        max_denoising_steps: int,
        pace: float = 0.0,
    ) -> None:
        self.console = console
        self.pieces = pieces
        self.stop_ids = stop_ids
        self.max_denoising_steps = max_denoising_steps
        self.pace = pace
        self.held_seconds = 0.0
        self._pending = Text()  # committed, and not yet given to the scrollback
        self._kind = "text"
        self._draft: Draft | None = None
        self._height = 0
        self._shown_at = 0.0
        # Between `show` and the painter; while the painter is idle, its caller may draw.
        self._handover = threading.Condition()
        self._coming: Draft | None = None
        self._drawing = False
        self._ended = False
        self._failure: BaseException | None = None
        self._painter = threading.Thread(target=self._paint, name="live view", daemon=True)
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        self._live.start()
        self._painter.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._handover:
            self._ended = True
            self._handover.notify_all()
        self._painter.join()
        self._live.update(Text(), refresh=True)
        self._live.stop()
        if self._pending.plain.strip():
            self.console.print(self._pending, soft_wrap=True, highlight=False)

    def show(self, event: Event) -> None:
        """A draft is left to the painter, which draws the newest; a commit stands there on return.
        Raises what drawing raised."""
        if isinstance(event, Draft):
            self.held_seconds += self._keep_pace()
            with self._handover:
                self._raise_failure()
                self._coming = event
                self._handover.notify_all()
        elif isinstance(event, Commit):
            self._keep_pace()
            self.settle()
            self._draft = None
            self._append("thinking", event.thinking)
            self._append("text", event.text)
            for call in event.tool_calls:
                self._append("tool call", describe_call(call))
            self._scroll()
            self._live.update(self.frame(), refresh=True)

    def note(self, text: str) -> None:
        """Shows one dim line in place of the canvas, until the first step."""
        self.settle()
        self._live.update(Text(text, "dim"), refresh=True)

    def settle(self) -> None:
        """Waits until the last draft shown is drawn."""
        with self._handover:
            self._handover.wait_for(lambda: self._coming is None and not self._drawing)
            self._raise_failure()

    def _paint(self) -> None:
        while True:
            with self._handover:
                self._drawing = False
                self._handover.notify_all()
                self._handover.wait_for(lambda: self._coming is not None or self._ended)
                if self._ended:
                    return
                self._draft, self._coming, self._drawing = self._coming, None, True
            try:
                if not self._live.console.is_terminal:  # rich would draw nothing, in silence
                    raise OSError(errno.EIO, "the terminal is gone")
                self._live.update(self.frame(), refresh=True)
            except BaseException as error:  # the caller's thread raises it
                self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _append(self, kind: str, text: str) -> None:
        if not text:
            return
        if kind != self._kind:
            if self._pending.plain and not self._pending.plain.endswith("\n"):
                self._pending.append("\n")
            if kind == "thinking":
                self._pending.append("thinking\n", "dim bold")
            elif self._kind == "thinking":
                self._pending.append("\n")
            self._kind = kind
        self._pending.append(printable(text), THINKING if kind == "thinking" else "")

    def _scroll(self) -> None:
        """Gives whole paragraphs to the scrollback once they fill half of the screen."""
        lines = len(self._wrapped(self._pending))
        cut = self._pending.plain.rfind("\n")
        if cut < 0 or lines <= self.console.size.height // 2:
            return
        done, rest = self._pending[:cut], self._pending[cut + 1 :]
        self._height = 0
        self._pending = rest
        self._live.update(Text(), refresh=True)
        self.console.print(done, soft_wrap=True, highlight=False)

    def frame(self) -> Text:
        text = self._pending.copy()
        if self._draft is not None:
            text.append(paint(self._draft, self.pieces, self.stop_ids))
        lines = self._wrapped(text)
        room = max(self.console.size.height - BARS_AND_STATUS - 1, 1)
        if len(lines) > room:
            lines = lines[-room:]
        # A region that never shrinks within a reply keeps the lines below it still.
        self._height = min(max(self._height, len(lines)), room)
        shown = Text("\n").join(lines)
        shown.append("\n" * (self._height - len(lines)))
        if self._draft is not None:
            shown.append("\n\n")
            shown.append(bars(self._draft, self.console.size.width))
            shown.append("\n")
            shown.append(self._status(self._draft), "dim")
        else:
            shown.append("\n" * BARS_AND_STATUS)
        return shown

    def _wrapped(self, text: Text) -> list[Text]:
        copy = text.copy()
        copy.expand_tabs(4)
        return list(copy.wrap(self.console, self.console.size.width, no_wrap=False))

    def _status(self, draft: Draft) -> str:
        accepted, size = int(draft.accepted.sum()), draft.accepted.size
        return fit(
            [
                f"step {draft.step} of {self.max_denoising_steps}",
                f"{accepted} of {size} accepted",
                f"entropy {float(draft.entropy.mean()):.2f}",
                f"block {draft.block + 1}",
            ],
            self.console.size.width,
        )

    def _keep_pace(self) -> float:
        """Sleeps until the last step was shown long enough; returns the seconds slept."""
        before = time.monotonic()
        wait = self._shown_at + self.pace - before
        if self.pace > 0 and wait > 0:
            time.sleep(wait)
        self._shown_at = time.monotonic()
        return self._shown_at - before


def fit(parts: list[str], width: int) -> str:
    """As many of the parts, the first ones first, as one line holds."""
    while len(parts) > 1 and len(SEPARATOR.join(parts)) > width:
        parts = parts[:-1]
    return SEPARATOR.join(parts)[:width]


def describe_call(call: dict[str, object]) -> str:
    """One line for a tool call: `name(argument=value)`."""
    arguments = call.get("arguments")
    if isinstance(arguments, dict):
        inside = ", ".join(
            f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items()
        )
    else:
        inside = str(arguments)
    return f"→ {call.get('name')}({inside})\n"
