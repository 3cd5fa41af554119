"""JSON's texts as expressions: strings, numbers within bounds, values of any shape.

Between tokens there is no white space but, where the model likes it, one space after a comma or a
colon. Characters beyond ASCII stand for themselves; escapes are the two-character ones and \\u00XX.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any

from mlx_dgemma.constraints.characters import ANY, Characters
from mlx_dgemma.constraints.expressions import Node, Space
from mlx_dgemma.constraints.regex import Builder
from mlx_dgemma.errors import LanguageError

ANY_DEPTH = 4  # how deeply a value of any shape may nest
_MOST_DIGITS = 40
MOST_DIVISOR = 1000
_SHORT = {'"': b'\\"', "\\": b"\\\\", "\n": b"\\n", "\t": b"\\t", "\r": b"\\r"}
_CONTROL = Characters([(0, 0x1F)])
_SPELLED = {**{chr(c): b"\\u%04x" % c for c in (*range(0x20), 0x7F)}, **_SHORT}
_PLAIN = ANY - _CONTROL - Characters.of('"\\') - Characters([(0x7F, 0x7F)])
_INTEGER = r"(0|-?[1-9]\d{0,15})"
_NUMBER = r"(0|-?(0|[1-9]\d{0,15})(\.\d{1,15})?([eE][+-]?\d{1,2})?)"


class JsonText:
    """JSON in one Space."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.inside = Builder(space, self._character)
        self._outside = Builder(space, lambda characters: characters.expression(space))
        self._values: dict[int, Node] = {}
        self._digit_runs: dict[tuple[str, str, int], Node] = {}
        self._integers: dict[tuple[int | None, ...], Node] = {}
        self._numbers: dict[tuple[Decimal | int | None, ...], Node] = {}

    @cached_property
    def comma(self) -> Node:
        return self.regex(", ?")

    @cached_property
    def colon(self) -> Node:
        return self.regex(": ?")

    @cached_property
    def character(self) -> Node:
        """One character inside a string."""
        return self._character(ANY)

    @cached_property
    def string(self) -> Node:
        return self.quoted(self.space.repeat(self.character))

    @cached_property
    def any_number(self) -> Node:
        return self.regex(_NUMBER)

    @cached_property
    def any_integer(self) -> Node:
        return self.regex(_INTEGER)

    def regex(self, pattern: str) -> Node:
        """Text that the pattern matches as a whole, not inside a string."""
        return self._outside.full(pattern)

    def quoted(self, content: Node) -> Node:
        return self.space.sequence([self.space.text('"'), content, self.space.text('"')])

    def constant(self, value: Any) -> Node:
        """One value, its objects in the order they are given."""
        return self.space.choice(self._spellings(value))

    def constants(self, values: list[Any]) -> Node:
        return self.space.choice([text for value in values for text in self._spellings(value)])

    def key(self, name: str) -> Node:
        """The name of a property."""
        return self.constant(name)

    def key_forms(self, name: str) -> list[Sequence[int]]:
        """Every way in which the name of a property may be written."""
        return [text for text in (self.spelled(name),) if text]

    def any_key(self, content: Node | None) -> Node:
        """Any name, or those with this content."""
        return self.string if content is None else self.quoted(content)

    def order(self, properties: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Properties in the order in which they are written."""
        return list(properties.items())

    def spelled(self, text: str) -> Sequence[int]:
        """A text as a string of this language, with its quotes; empty where it cannot be one."""
        return next(iter(self._spellings(text)), b"")

    def _spellings(self, value: Any) -> list[Sequence[int]]:
        if isinstance(value, str):
            return [b'"%b"' % _escaped(value)]
        texts = [json.dumps(value, ensure_ascii=False)]
        if isinstance(value, dict | list):
            texts.append(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
        # Half of a surrogate pair has no UTF-8: it is escaped.
        return [text.encode("utf-8", "backslashreplace") for text in dict.fromkeys(texts)]

    def value(self, depth: int = ANY_DEPTH) -> Node:
        """Any value whose arrays and objects nest at most `depth` deep."""
        if depth not in self._values:
            space = self.space
            scalars = [self.string, self.any_number, space.choice([b"true", b"false", b"null"])]
            nested = [self.array_of(depth), self.object_of(depth)] if depth > 0 else []
            self._values[depth] = space.either([*scalars, *nested])
        return self._values[depth]

    def array_of(self, depth: int) -> Node:
        return self.listed("[", self.value(depth - 1), "]")

    def object_of(self, depth: int) -> Node:
        member = self.space.sequence([self.string, self.colon, self.value(depth - 1)])
        return self.listed("{", member, "}")

    def listed(self, left: str, part: Node, right: str, low: int = 0, high: int = -1) -> Node:
        """low to high parts between brackets; a high of -1 is no bound."""
        space = self.space
        more = space.repeat(
            space.then(self.comma, part), max(low - 1, 0), high - 1 if high > 0 else high
        )
        inner = space.empty if high == 0 else space.then(part, more)
        if low == 0:
            inner = space.optional(inner)
        elif high == 0:
            inner = space.none
        return space.sequence([space.text(left), inner, space.text(right)])

    def integer(self, low: int | None, high: int | None, divisor: int = 1) -> Node:
        """Integers within inclusive bounds, multiples of the divisor."""
        if (low, high, divisor) not in self._integers:
            self._integers[low, high, divisor] = self._whole(low, high, divisor)
        return self._integers[low, high, divisor]

    def _whole(self, low: int | None, high: int | None, divisor: int) -> Node:
        _check_bounds(low, high)
        bounded = self.any_integer
        if low is not None or high is not None:
            bounded = self._between(low, high)
        return self._multiples(bounded, divisor)

    def number(self, low: Decimal | None, high: Decimal | None, divisors: Sequence[int]) -> Node:
        """Decimals within inclusive bounds without an exponent, with as many places as there are
        divisors of their digits, one less."""
        key = (low, high, *divisors)
        if key not in self._numbers:
            self._numbers[key] = self._decimals(low, high, divisors)
        return self._numbers[key]

    def _decimals(self, low: Decimal | None, high: Decimal | None, divisors: Sequence[int]) -> Node:
        _check_bounds(low, high)
        parts = []
        for count, divisor in enumerate(divisors):
            scale = 10**count
            first = None if low is None else math.ceil(Fraction(low) * scale)
            last = None if high is None else math.floor(Fraction(high) * scale)
            parts.append(self._multiples(self._between(first, last, count), divisor))
        return self.space.either(parts)

    def _multiples(self, digits: Node, divisor: int) -> Node:
        if divisor == 1:
            return digits
        sign = self.space.optional(self.space.text("-"))
        return self.space.both([digits, self.space.then(sign, self.space.multiple(divisor))])

    def _between(self, low: int | None, high: int | None, places: int = 0) -> Node:
        """Whole numbers within inclusive bounds, a point before their last `places` digits."""
        space = self.space
        if low is not None and high is not None and low > high:
            return space.none
        parts = []
        if high is None or high >= 0:
            parts.append(self._unsigned(max(low or 0, 0), high, places))
        if low is None or low < 0:
            top = None if low is None else -low
            start = 1 if high is None or high >= 0 else -high
            parts.append(space.then(space.text("-"), self._unsigned(start, top, places)))
        return space.either(parts)

    def _unsigned(self, low: int, high: int | None, places: int) -> Node:
        """From low to high, without needless zeros; at most 16 whole digits without a bound."""
        least = places + 1
        if high is not None and high >= 10**_MOST_DIGITS:
            high = None  # nobody writes so many
        last = 10 ** max(16 + places, len(str(low))) - 1 if high is None else high
        if low >= 10**_MOST_DIGITS:
            return self.space.none
        parts = []
        for digits in range(max(len(str(low)), least), max(len(str(last)), least) + 1):
            first = max(low, 10 ** (digits - 1) if digits > least else 0)
            top = min(last, 10**digits - 1)
            if first <= top:
                parts.append(self._digits(f"{first:0{digits}}", f"{top:0{digits}}", places))
        return self.space.either(parts)

    def _digits(self, low: str, high: str, places: int) -> Node:
        """As many digits as low has, a point before the last `places`."""
        key = (low, high, places)
        if key not in self._digit_runs:
            self._digit_runs[key] = self._digit_run(low, high, places)
        return self._digit_runs[key]

    def _digit_run(self, low: str, high: str, places: int) -> Node:
        space = self.space
        if not low:
            return space.empty
        point = space.text(".") if places and len(low) == places else space.empty
        full = set(low) == {"0"} and set(high) == {"9"}
        if full and (not places or len(low) <= places):
            return space.then(point, space.repeat(_digit(space, 0, 9), len(low), len(low)))
        first, last = int(low[0]), int(high[0])
        rest = len(low) - 1
        least, most = "0" * rest, "9" * rest
        if first == last or full:
            head = _digit(space, first, last)
            return space.sequence([point, head, self._digits(low[1:], high[1:], places)])
        options = [
            (first, first, low[1:], most),
            (first + 1, last - 1, least, most),
            (last, last, least, high[1:]),
        ]
        return space.then(
            point,
            space.either(
                space.then(_digit(space, a, b), self._digits(bottom, top, places))
                for a, b, bottom, top in options
                if a <= b
            ),
        )

    def _character(self, characters: Characters) -> Node:
        """A character of the set as a JSON string writes it."""
        space = self.space
        escapes = [text for sign, text in _SHORT.items() if sign in characters]
        for first, last in (characters & (_CONTROL | Characters([(0x7F, 0x7F)]))).ranges:
            escapes += [_SPELLED[chr(c)] for c in range(first, last + 1) if chr(c) not in _SHORT]
        return space.either([(characters & _PLAIN).expression(space), space.choice(escapes)])


def _escaped(text: str) -> bytes:
    """A text as a string holds it, each character in its only spelling."""
    return b"".join(_SPELLED.get(sign) or sign.encode("utf-8", "backslashreplace") for sign in text)


def _check_bounds(low: Decimal | int | None, high: Decimal | int | None) -> None:
    most = 10**_MOST_DIGITS
    if (low is not None and low >= most) or (high is not None and high <= -most):
        raise LanguageError(f"A bound of a number has more than {_MOST_DIGITS} digits.")


def _digit(space: Space, first: int, last: int) -> Node:
    return space.symbols(((1 << (last - first + 1)) - 1) << (ord("0") + first))


def _plain(value: Decimal) -> str:
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
