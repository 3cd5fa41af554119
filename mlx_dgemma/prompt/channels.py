"""Committed ids become text, thinking and tool calls; the markers between them never show.

The parser works on ids, because only there a marker differs from text that spells it, and on
whole characters, because ids may hold halves. `<|channel>thought\\n` is a header: it goes, once,
and a reply keeps every newline and every "thought" of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_dgemma.prompt.tokenizer import Tokenizer
from mlx_dgemma.prompt.tools import (
    DELIMITER,
    MARK,
    ToolCall,
    bare_call_end,
    bare_call_pattern,
    parse_tool_calls,
)

Kind = Literal["text", "thinking", "tool_call"]
_HEADER = "thought\n"


@dataclass(frozen=True)
class Piece:
    """A stretch of a reply.

    kind: "text" and "thinking" come in any number of stretches; a "tool_call" comes whole.
    text: for a tool call, what stands between its markers.
    calls: the calls parsed from it; empty for a malformed one, whose text is then all there is.
    """

    kind: Kind
    text: str
    calls: tuple[ToolCall, ...] = ()


class ChannelParser:
    """Feed committed ids block by block; get pieces as soon as they are certain.

    tools: the declared tool names. With them a call at the start of a line that lacks its
        markers is still recognised; without them such a line is prose.
    """

    def __init__(self, tokenizer: Tokenizer, *, tools: Collection[str] = ()):
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._names = {id_: name for name, id_ in tokenizer.ids.items()}
        self._kind: Kind = "text"
        self._header = False  # the header of the open thought may still come
        self._held = ""
        self._bare = _BareCalls(tools)

    def feed(self, ids: Iterable[int]) -> list[Piece]:
        """The pieces these ids settle."""
        pieces: list[Piece] = []
        run: list[int] = []
        for id_ in map(int, ids):
            if id_ not in self._tokenizer.control_ids:
                run.append(id_)
                continue
            pieces += self._words(self._detokenizer.feed(run) + self._detokenizer.finish())
            run = []
            pieces += self._marker(self._names.get(id_, ""))
        return pieces + self._words(self._detokenizer.feed(run))

    def finish(self) -> list[Piece]:
        """What is left when the reply is over; a thought or call without its end counts too."""
        return self._words(self._detokenizer.finish()) + self._close("text", marked=False)

    def _marker(self, name: str) -> list[Piece]:
        if name == "escape":
            return self._quote()
        if name == "soc":
            pieces = self._close("thinking", marked=False)
            self._header = True
            return pieces
        if name == "stc":
            return self._close("tool_call", marked=False)
        if (name, self._kind) in (("eoc", "thinking"), ("etc", "tool_call")):
            return self._close("text", marked=True)
        return []  # a stray marker, a bos, an image placeholder: nothing a reply shows

    def _quote(self) -> list[Piece]:
        if self._kind == "tool_call":
            self._held += MARK
            return []
        if self._kind == "text" and self._bare.reading:
            return self._bare.feed(MARK)
        return self._words('"')  # outside a call: a quotation mark that lost its call

    def _words(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._kind == "tool_call":
            self._held += text.replace(MARK, "\ufffd")
            return []
        if self._kind == "text":
            return self._bare.feed(text.replace(MARK, "\ufffd") if self._bare.reading else text)
        text, self._held = self._held + text, ""
        if self._header:
            if _HEADER.startswith(text) and text != _HEADER:
                self._held = text
                return []
            self._header = False
            text = text.removeprefix(_HEADER)
        # The newline before the end marker belongs to the frame, so the last one waits.
        if text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        return [Piece("thinking", text)] if text else []

    def _close(self, following: Kind, *, marked: bool) -> list[Piece]:
        kind, held = self._kind, self._held
        self._kind, self._held = following, ""
        header, self._header = self._header, False
        if kind == "text":
            return self._bare.finish()
        if kind == "tool_call":
            text = held.replace(MARK, DELIMITER)
            return [Piece("tool_call", text, parse_tool_calls(held))] if held.strip() else []
        if (header and _HEADER.startswith(held)) or (marked and held == "\n"):
            held = ""
        return [Piece("thinking", held)] if held else []


class _BareCalls:
    """Finds calls without markers in the answer's text; passes all other text on at once."""

    def __init__(self, names: Collection[str]):
        self._pattern = bare_call_pattern(names)
        self._heads = [head for name in names for head in (f"call:{name}(", f"{name}(")]
        self._held = ""
        self._line_begins = True

    @property
    def reading(self) -> bool:
        """Whether the start of a call is held back."""
        return bool(self._held)

    def feed(self, text: str) -> list[Piece]:
        if self._pattern is None:
            return [Piece("text", text)]
        self._held += text
        pieces: list[Piece] = []
        while self._held:
            if not self._line_begins:
                newline = self._held.find("\n")
                cut = newline + 1 if newline >= 0 else len(self._held)
                pieces.append(_text(self._held[:cut]))
                self._held = self._held[cut:]
                self._line_begins = newline >= 0
                continue
            body = self._held.lstrip(" \t")
            if self._pattern.match(body):
                end = bare_call_end(body)
                if end is None:
                    break
                calls = parse_tool_calls(body[:end])
                if calls:
                    text = body[:end].replace(MARK, DELIMITER)
                    pieces.append(Piece("tool_call", text, calls))
                    self._held = body[end:]
                    continue
            elif not body or any(head.startswith(body) for head in self._heads):
                break
            self._line_begins = False
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held, self._line_begins = self._held, "", True
        return [_text(held)] if held else []


def _text(held: str) -> Piece:
    """Text that looked like a call and was none; its delimiters were quotation marks."""
    return Piece("text", held.replace(MARK, '"'))


def parse(tokenizer: Tokenizer, ids: Iterable[int], *, tools: Collection[str] = ()) -> list[Piece]:
    """All pieces of a whole reply or of a draft, adjacent ones of a kind joined."""
    parser = ChannelParser(tokenizer, tools=tools)
    return join(parser.feed(ids) + parser.finish())


def join(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins neighbouring stretches of text and of thinking; tool calls stay apart."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and piece.kind == joined[-1].kind and piece.kind != "tool_call":
            joined[-1] = Piece(piece.kind, joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined
