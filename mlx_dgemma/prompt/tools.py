"""Reads the tool calls a model writes, in Gemma's form and in the forms it slips into.

    call:name{key:<|"|>text<|"|>,n:1,list:[true,null],nested:{k:2}}      as taught
    call:name(key="text", n=1)                                           in long sessions
    name{...}, name(...)                                                 the prefix forgotten
    {"name": "name", "arguments": {"key": "text"}}                       other models' form

mlx-lm's parser reads the first form with plain word names and keys; this one also takes dots,
hyphens and colons in names, any key, Python's spellings of constants, and text that itself
holds the string delimiter. Between the markers, where a call is certain, it also repairs a
missing comma, brackets too many, a code fence and unquoted text with commas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

DELIMITER = '<|"|>'
# Stands for the delimiter's id, so that a string may spell it in ordinary text: a noncharacter.
MARK = "\ufdd0"

_NAME = re.compile(r"[^\s{}()\[\],\"'=" + MARK + r"]+")
_KEY = re.compile(r"[^\s:={}()\[\],\"'" + MARK + r"]+")
_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,;]*")
_SURPLUS = re.compile(r"[\s,;})]*")
_SCALAR = re.compile(r"[^,{}()\[\]\"" + MARK + r"]+")
_INTEGER = re.compile(r"[+-]?\d{1,300}")
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?")
_QUOTED = {
    '"': re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL),
    "'": re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL),
}
_PYTHON_ESCAPE = re.compile(r"\\(['\"\\nrt/])")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
_CLOSING = {"{": "}", "(": ")", "[": "]"}
_FENCE = re.compile(r"```\w*\s*(.*?)\s*(?:```)?", re.DOTALL)
# Another member begins: after a comma that belongs to no text, or where a comma is missing.
_MEMBER = re.compile(r"\s*(?:[\w.$-]+|\"[^\"]*\")\s*[:=]")
_WORDS = re.compile(
    r"[^,{}()\[\]\"" + MARK + r"]+?(?=\s+[\w.$-]+\s*[:=]|[,{}()\[\]\"" + MARK + r"]|$)"
)
_MAX_DEPTH = 64


@dataclass(frozen=True)
class ToolCall:
    """One function call. arguments: JSON values by parameter name."""

    name: str
    arguments: dict[str, Any]


def parse_tool_calls(text: str, *, closed: bool = True) -> tuple[ToolCall, ...]:
    """Every call in the text between two tool-call markers, or () when it is malformed.

    text: strings are delimited by `<|"|>`, or by MARK where the caller knows the token ids.
    closed: whether the closing marker was there; without it nothing is repaired, and a name
        without arguments is no call, because more may have been cut off.
    """
    if MARK not in text:
        text = text.replace(DELIMITER, MARK)
    if not closed and not text.rstrip().endswith(("}", ")")):
        return ()
    if closed:
        fence = _FENCE.fullmatch(text.strip())
        text = text if fence is None else fence[1]
        foreign = _json_calls(text)
        if foreign:
            return foreign
    # A delimiter normally closes its string; when that reading fails, only one does that stands
    # before a comma or a bracket, so that a quotation inside the string survives.
    readings = [(False, False), (True, False), (False, True), (True, True)]
    for quotes_nest, repairs in readings if closed else readings[:2]:
        try:
            return tuple(_Reader(text, quotes_nest, repairs).calls())
        except ValueError:
            continue
    return ()


def _json_calls(text: str) -> tuple[ToolCall, ...]:
    """Calls written as JSON objects with a name and arguments; () for anything else."""
    try:
        value = json.loads(text.replace(MARK, '"'))
    except (ValueError, RecursionError):
        return ()
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        inner = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            return ()
        arguments = inner.get("arguments", inner.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return ()
        name = inner["name"].removeprefix("call:")
        if not isinstance(arguments, dict) or not is_tool_name(name):
            return ()
        calls.append(ToolCall(name, arguments))
    return tuple(calls)


def is_tool_name(name: str) -> bool:
    """Whether a call of this name can be read back."""
    return _NAME.fullmatch(name) is not None and not name.startswith("call:")


def is_argument_name(name: str) -> bool:
    """Whether an argument of this name can be written without quotes and read back."""
    return _KEY.fullmatch(name) is not None


def bare_call_end(text: str) -> int | None:
    """Where the bracket closes that a call outside the markers opens; None when it does not yet.

    text: from the call's first character on, its delimiters given as MARK.
    """
    start = re.search(r"[{(]", text)
    if start is None:
        return None
    reader = _Reader(text)
    reader.position = start.start()
    stack: list[str] = []
    while reader.position < len(text):
        character = text[reader.position]
        if character in (MARK, '"'):
            try:
                reader.string()
            except ValueError:
                return None
            continue
        reader.position += 1
        if character in _CLOSING:
            stack.append(_CLOSING[character])
        elif stack and character == stack[-1]:
            stack.pop()
            if not stack:
                return reader.position
    return None


def bare_call_pattern(names: Collection[str]) -> re.Pattern[str] | None:
    """The head of a call of a declared tool whose markers were forgotten, prefix included."""
    if not names:
        return None
    known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"call:(?:{known})[{{(]")


class _Reader:
    """Recursive descent over one text; every complaint is a ValueError."""

    def __init__(self, text: str, quotes_nest: bool = False, repairs: bool = False):
        self.text = text
        self.position = 0
        self._quotes_nest = quotes_nest
        self._repairs = repairs

    def calls(self) -> list[ToolCall]:
        calls = []
        self._skip(_SPACE)
        while self.position < len(self.text):
            calls.append(self._call())
            self._skip(_SURPLUS if self._repairs else _BETWEEN)
        if not calls:
            raise ValueError("no call")
        return calls

    def string(self) -> str:
        opening = self.text[self.position]
        if opening != MARK:
            match = _QUOTED[opening].match(self.text, self.position)
            if match is None:
                raise ValueError("string without an end")
            self.position = match.end()
            return _unescape(match.group(1))
        start = self.position + 1
        end = self.text.find(MARK, start)
        while end >= 0 and self._quotes_nest and not re.match(r"\s*[,:\]})]", self.text[end + 1 :]):
            end = self.text.find(MARK, end + 1)
        if end < 0:
            raise ValueError("string without an end")
        self.position = end + 1
        return self.text[start:end].replace(MARK, DELIMITER)

    def _call(self) -> ToolCall:
        word = self._take(_NAME)
        name = word.removeprefix("call:")
        self._skip(_SPACE)
        opening = self._peek()
        if not name or (opening not in ("{", "(") and name == word != self.text.strip()):
            raise ValueError("prose, not a call")
        return ToolCall(name, self._members(opening) if opening in ("{", "(") else {})

    def _members(self, opening: str, depth: int = 0) -> dict[str, Any]:
        members: dict[str, Any] = {}
        self._open(depth)
        while self._peek() != _CLOSING[opening]:
            quoted = self._peek() in (MARK, '"', "'")
            key = self.string() if quoted else self._take(_KEY)
            self._skip(_SPACE)
            if self._peek() not in (":", "="):
                raise ValueError("key without a value")
            self.position += 1
            members[key] = self._value(depth + 1)
            self._comma(_CLOSING[opening])
        self.position += 1
        return members

    def _value(self, depth: int) -> Any:
        self._skip(_SPACE)
        first = self._peek()
        if first == "{":
            return self._members("{", depth)
        if first == "[":
            items = []
            self._open(depth)
            while self._peek() != "]":
                items.append(self._value(depth + 1))
                self._comma("]")
            self.position += 1
            return items
        if first in (MARK, '"', "'"):
            return self.string()
        if not self._repairs:
            return _scalar(self._take(_SCALAR).strip())
        return _scalar(self._take_words().strip())

    def _take_words(self) -> str:
        """Unquoted text, with the commas after which no other member begins."""
        start = self.position
        self._take(_WORDS)
        while self._peek() == "," and not _MEMBER.match(self.text, self.position + 1):
            before, self.position = self.position, self.position + 1
            if _WORDS.match(self.text, self.position) is None:
                self.position = before
                break
            self._take(_WORDS)
        return self.text[start : self.position]

    def _open(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        self.position += 1
        self._skip(_SPACE)

    def _comma(self, closing: str) -> None:
        self._skip(_SPACE)
        if self._peek() == ",":
            self.position += 1
            self._skip(_SPACE)
        elif self._peek() != closing and not (
            self._repairs and closing != "]" and _MEMBER.match(self.text, self.position)
        ):
            raise ValueError("neither a comma nor the end")

    def _peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.position)
        assert match is not None
        self.position = match.end()

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.position)
        if match is None:
            raise ValueError("unexpected character")
        self.position = match.end()
        return match.group()


def _scalar(word: str) -> Any:
    """A constant, a number, or else the word itself, which was meant as a string."""
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    if _INTEGER.fullmatch(word):
        return int(word)
    if _FLOAT.fullmatch(word):
        number = float(word)
        # JSON has no infinity.
        return number if abs(number) != float("inf") else word
    if not word:
        raise ValueError("value missing")
    return word


def _unescape(body: str) -> str:
    try:
        return str(json.loads(f'"{body}"', strict=False))
    except ValueError:
        return _PYTHON_ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[1]), body)
