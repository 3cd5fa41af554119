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
_ANSWER_HEADER = "final\n"  # a channel other models put their answer in


@dataclass(frozen=True)
class Piece:
    """A stretch of a reply.

    kind: "text" and "thinking" come in any number of stretches; a "tool_call" comes whole.
    text: for a tool call, what stands between its markers.
    calls: the calls parsed from it; empty for a malformed one, whose text is then all there is.
    cut: the reply ended inside the call, which is therefore no call.
    """

    kind: Kind
    text: str
    calls: tuple[ToolCall, ...] = ()
    cut: bool = False


class ChannelParser:
    """Feed committed ids block by block; get pieces as soon as they are certain.

    tools: the declared tool names. With them a `call:name{...}` that lacks its markers is still
        recognised where the reply's answer begins, or directly after another call. Anywhere else,
        in running text or in a code fence, it is text: a model may quote what it has read.
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
        last = self._words(self._detokenizer.finish())
        return last + self._close("text", marked=False, over=True)

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
            headers = (_HEADER, _ANSWER_HEADER)
            if text not in headers and any(header.startswith(text) for header in headers):
                self._held = text
                return []
            self._header = False
            if text.startswith(_ANSWER_HEADER):
                self._kind = "text"
                return self._words(text.removeprefix(_ANSWER_HEADER))
            text = text.removeprefix(_HEADER)
        # The newline before the end marker belongs to the frame, so the last one waits.
        if text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        return [Piece("thinking", text)] if text else []

    def _close(self, following: Kind, *, marked: bool, over: bool = False) -> list[Piece]:
        kind, held = self._kind, self._held
        self._kind, self._held = following, ""
        header, self._header = self._header, False
        if kind == "text":
            return self._bare.finish(over)
        if kind == "tool_call":
            self._bare.begin()
            text = held.replace(MARK, DELIMITER)
            calls = parse_tool_calls(held, closed=marked)
            cut = over and not calls
            return [Piece("tool_call", text, calls, cut)] if held.strip() else []
        if (header and _HEADER.startswith(held)) or (marked and held == "\n"):
            held = ""
        return [Piece("thinking", held)] if held else []


class _BareCalls:
    """Finds calls without markers where the answer begins; passes all other text on at once."""

    def __init__(self, names: Collection[str]):
        self._pattern = bare_call_pattern(names)
        self._heads = [f"call:{name}{opening}" for name in names for opening in "{("]
        self._held = ""
        self._begins = True  # only calls and blanks so far

    @property
    def reading(self) -> bool:
        """Whether the start of a call is held back."""
        return bool(self._held)

    def begin(self) -> None:
        """A call between markers is over: another may follow."""
        self._begins = True

    def feed(self, text: str) -> list[Piece]:
        if self._pattern is None or not self._begins:
            return [Piece("text", text)]
        self._held += text
        pieces: list[Piece] = []
        while self._held:
            body = self._held.lstrip()
            if not self._pattern.match(body):
                if not body or any(head.startswith(body) for head in self._heads):
                    break
                self._begins = False
                pieces.append(_text(self._held))
                self._held = ""
                break
            end = bare_call_end(body)
            if end is None:
                break
            calls = parse_tool_calls(body[:end], closed=False)
            if not calls:
                self._begins = False
                pieces.append(_text(self._held))
                self._held = ""
                break
            pieces.append(Piece("tool_call", body[:end].replace(MARK, DELIMITER), calls))
            self._held = body[end:]
        return pieces

    def finish(self, over: bool) -> list[Piece]:
        held, self._held = self._held, ""
        if over and held.lstrip().startswith("call:"):
            return [Piece("tool_call", held.replace(MARK, DELIMITER), (), True)]
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
