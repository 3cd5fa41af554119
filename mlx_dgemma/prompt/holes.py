"""Text with holes: literal pieces, and how long what is missing may be.

"the <hole> sings"          the model chooses the length
"the <hole:2> sings"        two tokens
"the <hole:1-4> sings"      one to four tokens
"write \\<hole> like this"   an ordinary "<hole>"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dgemma.errors import InputError

_HOLE = re.compile(r"\\<hole|<hole(?::(?P<low>\d+)(?:-(?P<high>\d+))?)?>|<hole:[^>\n]*>")


@dataclass(frozen=True)
class Hole:
    """What is missing between two literals: low to high tokens; None leaves it to the model.

    constraint: a Constraint that the whole filling is held to.
    """

    low: int | None = None
    high: int | None = None
    constraint: object | None = None

    def __post_init__(self) -> None:
        if self.low is None:
            return
        if self.low < 1 or self.high is None or self.high < self.low:
            raise InputError(
                f"A hole of {self.low} to {self.high} tokens is not possible: use <hole:N> or "
                "<hole:N-M> with 1 <= N <= M."
            )

    @classmethod
    def of(cls, length: int | tuple[int, int] | None) -> Hole:
        """From a number of tokens, a range, or None."""
        if length is None:
            return cls()
        if isinstance(length, int):
            return cls(length, length)
        return cls(*length)


def parse_holes(text: str) -> list[str | Hole]:
    """Literals and holes by turns, a literal (maybe empty) first and last.

    Raises InputError when the text has no hole or a hole's length is malformed.
    """
    parts: list[str | Hole] = []
    literal, position = "", 0
    for match in _HOLE.finditer(text):
        literal += text[position : match.start()]
        position = match.end()
        if match.group().startswith("\\"):
            literal += match.group()[1:]
            continue
        low, high = match["low"], match["high"]
        if low is None and match.group() != "<hole>":
            raise InputError(
                f"{match.group()} is no hole: write <hole>, <hole:N> or <hole:N-M>, or \\<hole> "
                "for the word itself."
            )
        parts += [literal, Hole(None if low is None else int(low), int(high or low or 0) or None)]
        literal = ""
    if not parts:
        raise InputError("The text has no hole: mark what is missing with <hole>.")
    return [*parts, literal + text[position:]]


def cut_spans(
    text: str, spans: Sequence[tuple[int, int]], length: int | tuple[int, int] | None = None
) -> list[str | Hole]:
    """`text` with the characters of each span (start, end) made a hole.

    Raises InputError for spans that are empty, out of order, overlapping or out of the text.
    """
    if not spans:
        raise InputError("There is no span to fill: give at least one (start, end).")
    if not all(isinstance(span, Sequence) and len(span) == 2 for span in spans):
        raise InputError("spans is a list of pairs, [(start, end)], also where it is one alone.")
    parts: list[str | Hole] = []
    position = 0
    for start, end in spans:
        if not position <= start < end <= len(text):
            raise InputError(
                f"The span ({start}, {end}) is not possible: spans are (start, end) with start < "
                f"end, in order, apart, within the text of {len(text)} characters."
            )
        parts += [text[position:start], Hole.of(length)]
        position = end
    return [*parts, text[position:]]
