"""The regular expressions a canvas can pin: literal text and character classes, nothing nested.

^[A-Z]{2}-\\d{4}$        two holes around a literal: "AB-2026"
^v\\d+$                  a literal, then as many digits as the model likes
^(cat|dog)$            one of the words
"""

from __future__ import annotations

import re
from typing import Any

from mlx_dgemma.prompt.holes import Hole

_MOST = 32  # tokens of a repeat without an end
# Matching may go back over each open repeat, so a few are quick and many are not.
_MOST_OPEN = 4
_ATOM = re.compile(
    r"(?P<literal>[^\\^$.|?*+()\[\]{}]|\\[^A-Za-z0-9])"
    r"|(?P<members>\[\^?(?:\\[dws\W]|[^\\\[\]])+\]|\\[dw])(?:\{(?P<low>\d+)(?P<high>,\d*)?\}|(?P<open>\+))?"
)
_WORDS = re.compile(r"\^\((?:\?:)?([\w -]+(?:\|[\w -]+)+)\)\$")
_SET_OPERATORS = re.compile(r"--|&&|\|\||~~")
# What would end or break the JSON string around the hole.
_SAFE = r'(?!["\\\x00-\x1f])'


def parse_pattern(pattern: Any) -> list[str | Hole] | None:
    """Literals and holes of a pattern between ^ and $, or None when it is more than that."""
    if not isinstance(pattern, str) or len(pattern) > 1000:
        return None
    if len(pattern) < 2 or pattern[0] != "^" or pattern[-1] != "$":
        return None
    words = _WORDS.fullmatch(pattern)
    if words is not None:
        return [Hole(choices=tuple(dict.fromkeys(words[1].split("|"))))]
    parts: list[str | Hole] = []
    position, opened = 1, 0
    while position < len(pattern) - 1:
        atom = _ATOM.match(pattern, position, len(pattern) - 1)
        if atom is None:
            return None
        position = atom.end()
        if atom["literal"]:
            parts.append(atom["literal"][-1])
            continue
        hole = _hole(atom)
        opened += atom["high"] is not None or atom["open"] is not None
        if hole is None or opened > _MOST_OPEN:
            return None
        parts.append(hole)
    return parts


def _hole(atom: re.Match[str]) -> Hole | None:
    """As many tokens as the class repeats: where that is counted, a token is one character."""
    low = int(atom["low"] or 1)
    high = low
    if atom["open"] or atom["high"] == ",":
        high = _MOST
    elif atom["high"]:
        high = int(atom["high"][1:])
    alphabet = f"(?:{_SAFE}{atom['members']}){'+' if atom['open'] else ''}"
    if not 1 <= low <= min(high, _MOST) or _SET_OPERATORS.search(alphabet):
        return None
    try:
        re.compile(alphabet, re.ASCII)
    except (re.error, OverflowError):
        return None
    return Hole(low, min(high, _MOST), alphabet=alphabet)
