"""A pattern as an expression: of the text itself, or as it stands inside a JSON string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from mlx_dgemma.constraints.characters import ANY, Characters
from mlx_dgemma.constraints.expressions import Node, Space
from mlx_dgemma.constraints.patterns import (
    Anchor,
    Look,
    Options,
    Repeat,
    Row,
    Set,
    Tree,
    alternatives,
    begins_anchored,
    has_start,
    may_be_empty,
    parse,
)
from mlx_dgemma.errors import UnsupportedError

Writer = Callable[[Characters], Node]
Place = Literal["start", "later", "unknown"]  # in the text: ^ holds, does not, or may
_START: Place = "start"
_LATER: Place = "later"
_UNKNOWN: Place = "unknown"


def full_match(space: Space, pattern: str) -> Node:
    """The texts that the pattern matches from their first character to the last."""
    return Builder(space, lambda characters: characters.expression(space)).full(pattern)


class Builder:
    """Expressions of patterns whose characters are written by `writer`."""

    def __init__(self, space: Space, writer: Writer) -> None:
        self._space = space
        self._writer = writer
        self._written: dict[tuple[tuple[int, int], ...], Node] = {}
        self._full: dict[str, Node] = {}
        self._found: dict[str, Node] = {}
        self.any_text = space.repeat(self._character(ANY), 0)

    def full(self, pattern: str) -> Node:
        """The texts that the pattern matches from end to end."""
        key = str(pattern)  # parse refuses what is no text
        if key not in self._full:
            self._full[key] = self._build(parse(pattern), self._space.empty, _START)
        return self._full[key]

    def literal(self, text: str) -> Node:
        """Exactly this text."""
        return self._space.sequence([self._character(Characters.of(sign)) for sign in text])

    def search(self, pattern: str) -> Node:
        """The texts in which the pattern matches somewhere."""
        key = str(pattern)
        if key not in self._found:
            self._found[key] = self._search(pattern)
        return self._found[key]

    def _search(self, pattern: str) -> Node:
        space = self._space
        found = []
        for tree in alternatives(parse(pattern)):
            if not has_start(tree):
                found.append(space.then(self.any_text, self._build(tree, self.any_text, _START)))
                continue
            found.append(self._build(tree, self.any_text, _START))
            if not begins_anchored(tree):
                later = self._build(tree, self.any_text, _LATER)
                ahead = space.repeat(self._character(ANY), 1)
                found.append(space.then(ahead, later))
        return space.either(found)

    def _build(self, tree: Tree, rest: Node, place: Place) -> Node:
        """What `tree` and then `rest` match. place: where in the text the tree begins."""
        space = self._space
        if isinstance(tree, Set):
            return space.then(self._character(tree.characters), rest)
        if isinstance(tree, Options):
            return space.either(self._build(part, rest, place) for part in tree.parts)
        if isinstance(tree, Row):
            places = [place]
            for part in tree.parts:
                places.append(_after(part, places[-1]))
            for part, here in zip(reversed(tree.parts), places[-2::-1], strict=True):
                rest = self._build(part, rest, here)
            return rest
        if isinstance(tree, Look):
            ahead = self._build(tree.part, self.any_text, place)
            if not tree.wanted:
                ahead = space.without(ahead)
            return space.both([ahead, rest])
        if isinstance(tree, Anchor):
            if tree.at == "end":
                return space.empty if rest.nullable else space.none
            if place == _UNKNOWN:
                raise UnsupportedError(
                    "A regular expression has a '^' that is not at its start: take it out."
                )
            return rest if place == _START else space.none
        return self._repeated(tree, rest, place)

    def _repeated(self, tree: Repeat, rest: Node, place: Place) -> Node:
        space = self._space
        if not _looks(tree.part):
            part = self._build(tree.part, space.empty, place)
            return space.then(space.repeat(part, tree.low, tree.high), rest)
        if (tree.low, tree.high) not in ((0, 1), (1, 1)):
            raise UnsupportedError(
                "A regular expression repeats a group that looks ahead or has an anchor: "
                "write it without."
            )
        once = self._build(tree.part, rest, place)
        return once if tree.low else space.either([once, rest])

    def _character(self, characters: Characters) -> Node:
        found = self._written.get(characters.ranges)
        if found is None:
            found = self._written[characters.ranges] = self._writer(characters)
        return found


def _looks(tree: Tree) -> bool:
    if isinstance(tree, Look | Anchor):
        return True
    if isinstance(tree, Options | Row):
        return any(_looks(part) for part in tree.parts)
    return isinstance(tree, Repeat) and _looks(tree.part)


def _after(tree: Tree, place: Place) -> Place:
    """Where what follows a tree begins."""
    if place == _LATER or isinstance(tree, Look | Anchor):
        return place
    return _UNKNOWN if may_be_empty(tree) else _LATER
