"""From committed ids to what a reader gets: answer, thoughts, tool calls, cut at stop strings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.channels import ChannelParser, Piece
from mlx_dgemma.prompt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Increment:
    """What some ids add to a reply.

    stopped: a stop string was met; nothing follows. cut_call: the call the reply ended inside.
    """

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    malformed_calls: tuple[str, ...] = ()
    cut_call: str = ""
    stopped: bool = False

    @property
    def empty(self) -> bool:
        return self == Increment(stopped=self.stopped)


class ReplyReader:
    """Reads committed ids block by block.

    stop: strings that end the answer, also across block edges; they are not part of it, and
        they are not looked for in thoughts or tool calls. tools: names of declared tools.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), tools: Collection[str] = ()
    ) -> None:
        self._parser = ChannelParser(tokenizer, tools=tools)
        self._stop = StopStrings(stop)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stop.met

    def feed(self, ids: Iterable[int]) -> Increment:
        return self._read(self._parser.feed(ids))

    def finish(self) -> Increment:
        """What was held back: half a character, the start of a stop string, an open thought."""
        last = self._read(self._parser.finish())
        if last.stopped:
            return last
        return replace(last, text=last.text + self._stop.finish())

    def _read(self, pieces: Iterable[Piece]) -> Increment:
        text, thinking, cut_call = "", "", ""
        calls: list[dict[str, Any]] = []
        malformed: list[str] = []
        for piece in pieces:
            if piece.kind == "thinking":
                thinking += piece.text
            elif piece.calls:
                calls += [{"name": call.name, "arguments": call.arguments} for call in piece.calls]
            elif piece.cut:
                cut_call += piece.text
            else:
                if piece.kind == "tool_call":
                    malformed.append(piece.text)
                text += self._stop.feed(piece.text)
                if self._stop.met is not None:
                    break
        met = self._stop.met is not None
        return Increment(text, thinking, tuple(calls), tuple(malformed), cut_call, met)


class StopStrings:
    """Passes text through until one of the strings appears; holds back what may begin one."""

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str):
            strings = [strings]
        if not isinstance(strings, Iterable):
            raise InputError(f"stop={strings!r} is not possible: use a string or a list of them.")
        strings = tuple(strings)
        if any(not isinstance(string, str) or not string for string in strings):
            raise InputError("A stop string is empty or no text: give at least one character.")
        self._strings = strings
        self._held = ""
        self.met: str | None = None

    def feed(self, text: str) -> str:
        """The text that no stop string can still claim."""
        if self.met is not None:
            return ""
        text, self._held = self._held + text, ""
        found = [(text.find(string), string) for string in self._strings if string in text]
        if found:
            # The one complete first, so that it does not matter how the text was cut.
            at, self.met = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
            return text[:at]
        longest = max((len(string) for string in self._strings), default=1) - 1
        for kept in range(max(len(text) - longest, 0), len(text)):
            if any(string.startswith(text[kept:]) for string in self._strings):
                self._held = text[kept:]
                return text[:kept]
        return text

    def finish(self) -> str:
        """What was held back and now cannot become a stop string."""
        held, self._held = self._held, ""
        return held
