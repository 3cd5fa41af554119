"""JSON that anyone may have written, read with limits before anything is expanded.

Python's reader recurses as deep as the text nests, multiplies a short text into much memory, and
takes NaN, Infinity, 1e999 and half characters (lone surrogates). Here all of these are refused
in words, and what is accepted can be formatted, compared and converted to float without an error.
"""

from __future__ import annotations

import json
import json.scanner
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The most that one text may hold.

    size: bytes. depth: of nesting. parts: values and members. digits: of one number.
    """

    size: int = 16 << 20
    depth: int = 64
    parts: int = 500_000
    digits: int = 64  # tokenizer_config.json writes 10**30 for "no limit"


DEFAULT = Limits()
# A string, or what follows a quotation mark that none closes. Possessive: no text makes it slow.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
# Up to 256 strings of up to 4,096 escapes each, and what stands before them; and so much of one.
_STRINGS = re.compile(r'(?:[^"]*+"(?:[^"\\]++|\\.){0,4096}+"){1,256}+', re.DOTALL)
_INSIDE = re.compile(r'(?:[^"\\]++|\\.){0,100000}+', re.DOTALL)
_MOST_AT_ONCE = 50_000  # quotation marks of a text that the reader in C, which lets no other thread
# run until it is through, may have
_BRACKET = re.compile(r"[\[\]{}]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class UntrustedJSONError(ValueError):
    """Why a text was not read; the message continues a sentence: "config.json <message>"."""


def parse(text: bytes | str, limits: Limits = DEFAULT) -> Any:
    """The value of a JSON text (UTF-8 where it is bytes).

    Raises UntrustedJSONError for everything else and for what exceeds the limits. Time and memory
    are linear in the text's length.
    """
    if len(text) > limits.size:
        raise UntrustedJSONError(f"is larger than {limits.size:,} bytes")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UntrustedJSONError(f"is not valid UTF-8 (byte {error.start:,})") from error
    _check_structure(text, limits)

    def integer(digits: str) -> int:
        if len(digits) > limits.digits:
            raise UntrustedJSONError(f"holds a number of {len(digits):,} digits")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if len(digits) > limits.digits or not math.isfinite(value):
            raise UntrustedJSONError(f"holds the number {digits[:20]}, which is out of range")
        return value

    def constant(name: str) -> float:
        raise UntrustedJSONError(f"holds {name}, which is not JSON")

    decoder = json.JSONDecoder(parse_int=integer, parse_float=real, parse_constant=constant)
    if text.count('"') > _MOST_AT_ONCE:
        decoder.scan_once = json.scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]
    try:
        if text.startswith("\ufeff"):
            raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise UntrustedJSONError(f"is not valid JSON ({error})") from error
    if ("\\ud" in text or "\\uD" in text or not text.isascii()) and _has_surrogate(value):
        raise UntrustedJSONError("holds half a character (a lone surrogate)")
    return value


def shown(value: Any, most: int = 60) -> str:
    """A value for a message: one printable line, cut where it is long."""
    if isinstance(value, dict | list | tuple):
        kind = "an object" if isinstance(value, dict) else "a list"
        short = len(value) <= 4 and all(isinstance(v, int | float) for v in value)
        plain = short and not isinstance(value, dict)
        text = "{}" if value == {} else f"{kind} of {len(value):,}"
        text = json.dumps(value) if plain else text
    elif isinstance(value, str | int | float | None):
        text = json.dumps(value[: most + 1] if isinstance(value, str) else value)
    else:
        text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def printable(name: str, most: int = 120) -> str:
    """A name from a file for a message: without control characters, cut where it is long."""
    cut = name if len(name) <= most else name[: most - 3] + "..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def _check_structure(text: str, limits: Limits) -> None:
    """Counts brackets and commas outside strings, as far as the text could exceed the limits."""
    opened = text.count("[") + text.count("{")
    if opened <= limits.depth and opened + text.count(",") <= limits.parts:
        return
    # Every string is a value or a key. What follows takes its time for each, and lets no other
    # thread run meanwhile.
    if text.count('"') - text.count('\\"') > 4 * limits.parts:
        raise UntrustedJSONError(f"holds more than {limits.parts:,} values")
    bare = "".join(_outside_strings(text))
    if bare.count("[") + bare.count("{") + bare.count(",") > limits.parts:
        raise UntrustedJSONError(f"holds more than {limits.parts:,} values")
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        character = bracket.group()
        if character in "[{":
            depth += 1
            if depth > limits.depth:
                raise UntrustedJSONError(f"nests deeper than {limits.depth} levels")
        else:
            depth -= 1


def _outside_strings(text: str) -> Iterator[str]:
    """What stands outside the strings, piece by piece, so that other threads get their turns."""
    position = 0
    while position < len(text):
        if found := _STRINGS.match(text, position):
            yield _STRING.sub("", found.group())
            position = found.end()
            continue
        opening = text.find('"', position)  # of a long string, or of one that none closes
        if opening < 0:
            yield text[position:]
            return
        yield text[position:opening]
        position, before = opening + 1, opening
        while position > before and text[position : position + 1] != '"':
            before = position
            inside = _INSIDE.match(text, position)
            position = before if inside is None else inside.end()
        if position == before:  # its end is missing
            return
        position += 1


def _has_surrogate(value: Any) -> bool:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if not one.isascii() and _SURROGATE.search(one):
                return True
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
    return False
