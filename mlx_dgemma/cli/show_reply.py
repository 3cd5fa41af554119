"""One reply on its way to the user: live on a terminal, as plain text, or silently."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from rich.console import Console
from rich.text import Text

from mlx_dgemma.cli import summary
from mlx_dgemma.cli.command import quiet_keyboard
from mlx_dgemma.cli.draft_view import THINKING, printable
from mlx_dgemma.cli.live import LiveView, describe_call, fit
from mlx_dgemma.cli.session import Session
from mlx_dgemma.decoding.events import Commit, Event, Finish
from mlx_dgemma.prompt.media import Medium


class View(Protocol):
    """Whatever shows events to a person."""

    def show(self, event: Event) -> None: ...


@dataclass
class Reply:
    """What was committed, and the Finish once there is one.

    tokens: what is known of each committed id, in Commit's words.
    held_seconds: how long a display slept inside the measured time.
    """

    text: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    finish: Finish | None = None
    held_seconds: float = 0.0

    def add(self, event: Event) -> None:
        if isinstance(event, Commit):
            self.text += event.text
            self.thinking += event.thinking
            self.tool_calls += event.tool_calls
            self.ids += event.ids
            self.tokens += [
                {"id": token, "logprob": logprob, "entropy": entropy, "settled": settled}
                for token, logprob, entropy, settled in zip(
                    event.ids, event.logprobs, event.entropies, event.settled, strict=False
                )
            ]
        elif isinstance(event, Finish):
            self.finish = event


class PlainView:
    """Writes committed text as it comes; thoughts, dimmed, only to a terminal."""

    def __init__(self, stream: IO[str], console: Console | None = None) -> None:
        self.stream = stream
        self.console = console  # set where a person reads along
        self._written = ""
        self._thinking = False

    def show(self, event: Event) -> None:
        if not isinstance(event, Commit):
            return
        if self.console is not None and event.thinking:
            self._thinking = True
            thought = Text(printable(event.thinking), THINKING)
            self.console.print(thought, soft_wrap=True, end="", highlight=False)
        if event.text and self._thinking:
            self._write("\n\n")
            self._thinking = False
        self._write(event.text)
        for call in event.tool_calls:
            self._write(("" if self._written.endswith("\n") else "\n") + describe_call(call))

    def end(self) -> None:
        """A reply ends its last line."""
        if self._written and not self._written.endswith("\n"):
            self._write("\n")

    def _write(self, text: str) -> None:
        self.stream.write(printable(text) if self.console else text)
        self.stream.flush()
        self._written = text or self._written


def receive(events: Iterable[Event], session: Session, console: Console, *, live: bool) -> Reply:
    """Shows the events on the console as they come and returns what they added up to.

    live: redraw the canvas at every step; otherwise print every block when it is committed.
    """
    reply = Reply()
    if live:
        view = LiveView(
            console,
            session.pieces,
            session.tokenizer.stop_ids,
            max_denoising_steps=session.max_denoising_steps,
            pace=session.pace,
        )
        with quiet_keyboard(), view:
            view.note("reading the prompt")
            _follow(events, reply, view)
        reply.held_seconds = view.held_seconds
        return reply
    plain = PlainView(sys.stdout, console if console.is_terminal else None)
    _follow(events, reply, plain)
    plain.end()
    return reply


def collect(events: Iterable[Event]) -> Reply:
    """Takes all events without showing any."""
    reply = Reply()
    for event in events:
        reply.add(event)
    return reply


def _follow(events: Iterable[Event], reply: Reply, view: View) -> None:
    for event in events:
        reply.add(event)
        view.show(event)


def print_summary(reply: Reply, console: Console, media: Sequence[Medium] = ()) -> None:
    """One dim line, or two where it does not fit; above it one per image or video."""
    if reply.finish is None:
        return
    for medium in media:
        console.print(Text(printable(str(medium)), "dim"), soft_wrap=True)
    rest = summary.parts(reply.finish, reply.held_seconds)
    while rest:
        line = fit(rest, console.size.width)
        rest = rest[line.count(" · ") + 1 :]
        console.print(Text(line, "dim"), soft_wrap=True)
