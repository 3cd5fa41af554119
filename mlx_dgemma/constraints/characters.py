"""Sets of characters, and their UTF-8 as expressions over bytes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache

from mlx_dgemma.constraints.expressions import Node, Space

Range = tuple[int, int]
LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_FEW = 1000  # characters that are looked up one by one
_WITH_CASES = (
    *((0, 0x2FFF), (0xA640, 0xABFF), (0xFB00, 0xFFFF)),
    *((0x10400, 0x10DFF), (0x11800, 0x118FF), (0x16E00, 0x16EFF), (0x1E900, 0x1E9FF)),
)
_ENDS = (0x7F, 0x7FF, 0xFFFF, LAST)


class Characters:
    """A set of code points: sorted, disjoint, inclusive ranges without surrogates."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        joined: list[Range] = []
        for first, last in sorted(ranges):
            if joined and first <= joined[-1][1] + 1:
                joined[-1] = (joined[-1][0], max(joined[-1][1], last))
            elif first <= last:
                joined.append((first, last))
        self.ranges = tuple(_without_surrogates(joined))

    @classmethod
    def of(cls, text: str) -> Characters:
        return cls((ord(c), ord(c)) for c in text)

    def __or__(self, other: Characters) -> Characters:
        return Characters([*self.ranges, *other.ranges])

    def __invert__(self) -> Characters:
        gaps, start = [], 0
        for first, last in self.ranges:
            gaps.append((start, first - 1))
            start = last + 1
        return Characters([*gaps, (start, LAST)])

    def __and__(self, other: Characters) -> Characters:
        return ~(~self | ~other)

    def __sub__(self, other: Characters) -> Characters:
        return self & ~other

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __contains__(self, character: str) -> bool:
        return any(first <= ord(character) <= last for first, last in self.ranges)

    def folded(self) -> Characters:
        """With both cases of every ASCII letter."""
        extra = []
        for first, last in self.ranges:
            for low, high, shift in ((65, 90, 32), (97, 122, -32)):
                a, b = max(first, low), min(last, high)
                if a <= b:
                    extra.append((a + shift, b + shift))
        return Characters([*self.ranges, *extra])

    def every_case(self) -> Characters:
        """With all other cases of its letters, in all of Unicode."""
        return _every_case(self.ranges)

    def expression(self, space: Space) -> Node:
        """One character of the set, in UTF-8."""
        ascii_mask, longer = 0, []
        for first, last in self.ranges:
            for low, high in _of_one_length(first, last):
                if high <= 0x7F:
                    ascii_mask |= _mask(low, high)
                else:
                    longer.append(_encoded(space, chr(low).encode(), chr(high).encode()))
        return space.either([space.symbols(ascii_mask), *longer])


@lru_cache(maxsize=256)
def _every_case(ranges: tuple[Range, ...]) -> Characters:
    whole = Characters(ranges)
    if sum(last - first for first, last in ranges) < _FEW:
        letters = [chr(point) for first, last in ranges for point in range(first, last + 1)]
    else:
        letters = [letter for letter in _cases() if letter in whole]
    others = (case for letter in letters for case in _cases().get(letter, ()))
    return Characters([*ranges, *((ord(case), ord(case)) for case in others)])


@cache
def _cases() -> dict[str, set[str]]:
    """Every letter that has cases, and these. A long s is an s, the sign of Kelvin a k."""
    alike = {"i": {"\u0130"}}  # a Turkish I with its dot; the one without is its own lower case
    for first, last in _WITH_CASES:
        for sign in map(chr, range(first, last + 1)):
            lower, upper = sign.lower(), sign.upper()
            if lower != sign or upper != sign:
                for folded in {lower, upper.lower(), sign.casefold()}:
                    alike.setdefault(folded, set()).add(sign)
    found: dict[str, set[str]] = {}
    for signs in alike.values():
        for sign in signs:
            found.setdefault(sign, set()).update(signs)
    return found


def _without_surrogates(ranges: list[Range]) -> Iterable[Range]:
    low, high = _SURROGATES
    for first, last in ranges:
        for a, b in ((first, min(last, low - 1)), (max(first, high + 1), last)):
            if a <= b:
                yield a, b


def _of_one_length(first: int, last: int) -> Iterable[Range]:
    start = first
    for end in _ENDS:
        if start <= min(end, last):
            yield start, min(end, last)
            start = end + 1


def _mask(low: int, high: int) -> int:
    return ((1 << (high - low + 1)) - 1) << low


def _encoded(space: Space, low: bytes, high: bytes) -> Node:
    """Every encoding between two of one length."""
    if len(low) == 1:
        return space.symbols(_mask(low[0], high[0]))
    tail = len(low) - 1
    least, most = b"\x80" * tail, b"\xbf" * tail
    if low[0] == high[0]:
        return space.then(space.symbols(1 << low[0]), _encoded(space, low[1:], high[1:]))
    parts = []
    first, last = low[0], high[0]
    if low[1:] != least:
        parts.append(space.then(space.symbols(1 << first), _encoded(space, low[1:], most)))
        first += 1
    if high[1:] != most:
        parts.append(space.then(space.symbols(1 << last), _encoded(space, least, high[1:])))
        last -= 1
    if first <= last:
        parts.append(space.then(space.symbols(_mask(first, last)), _encoded(space, least, most)))
    return space.either(parts)


ANY = Characters([(0, LAST)])
DIGIT = Characters([(48, 57)])
WORD = Characters([(48, 57), (65, 90), (95, 95), (97, 122)])
SPACE = Characters([(9, 13), (32, 32)])
