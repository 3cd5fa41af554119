"""The expressions of a Space, and the moves between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple


class Node:
    """One expression of a Space. nullable: whether it holds the empty string.

    mask: the symbols of a set, or those a word may begin with. low, high: bounds of a repetition;
    the number of an alternative's only set, the place of words in a list, a divisor and remainder.
    """

    __slots__ = ("children", "high", "kind", "least", "low", "mask", "moves", "nullable", "number")

    def __init__(
        self,
        number: int,
        kind: str,
        children: tuple[Node, ...],
        nullable: bool,
        mask: int,
        low: int,
        high: int,
    ) -> None:
        self.number, self.kind, self.children = number, kind, children
        self.nullable, self.mask, self.low, self.high = nullable, mask, low, high
        self.least: int | None = 0 if nullable else None
        self.moves: list[Move] | None = None


class Move(NamedTuple):
    """Symbols that lead to the same expression."""

    mask: int
    target: Node


def branches(
    words: list[tuple[int, ...]], low: int, high: int, depth: int
) -> Iterator[tuple[int, int]]:
    """Where sorted words low to high, alike up to a depth, part by their next symbol."""
    while low < high:
        end = bisect_right(words, words[low][depth], low, high, key=lambda word: word[depth])
        yield low, end
        low = end
