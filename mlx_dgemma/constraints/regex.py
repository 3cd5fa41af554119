"""A pattern as an expression: of the text itself, or as it stands inside a JSON string."""

from __future__ import annotations

from collections.abc import Callable

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
    parse,
)
from mlx_dgemma.errors import UnsupportedError

Writer = Callable[[Characters], Node]


def full_match(space: Space, pattern: str) -> Node:
    """The texts that the pattern matches from their first character to the last."""
    return Builder(space, lambda characters: characters.expression(space)).full(pattern)


class Builder:
    """Expressions of patterns whose characters are written by `writer`."""

    def __init__(self, space: Space, writer: Writer) -> None:
        self._space = space
        self._writer = writer
        self._written: dict[tuple[tuple[int, int], ...], Node] = {}
        self.any_text = space.repeat(self._character(ANY), 0)

    def full(self, pattern: str) -> Node:
        tree = parse(pattern)
        return self._build(tree, self._space.empty, start=True)

    def literal(self, text: str) -> Node:
        """Exactly this text."""
        return self._space.sequence([self._character(Characters.of(sign)) for sign in text])

    def search(self, pattern: str) -> Node:
        """The texts in which the pattern matches somewhere."""
        space = self._space
        found = []
        for tree in alternatives(parse(pattern)):
            inner = self._build(tree, self.any_text, start=True)
            found.append(inner if begins_anchored(tree) else space.then(self.any_text, inner))
        return space.either(found)

    def _build(self, tree: Tree, rest: Node, *, start: bool) -> Node:
        """What `tree` and then `rest` match. start: nothing stands before it."""
        space = self._space
        if isinstance(tree, Set):
            return space.then(self._character(tree.characters), rest)
        if isinstance(tree, Options):
            return space.either(self._build(part, rest, start=start) for part in tree.parts)
        if isinstance(tree, Row):
            for index in range(len(tree.parts) - 1, -1, -1):
                first = start and all(isinstance(p, Look | Anchor) for p in tree.parts[:index])
                rest = self._build(tree.parts[index], rest, start=first)
            return rest
        if isinstance(tree, Look):
            ahead = self._build(tree.part, self.any_text, start=False)
            if not tree.wanted:
                ahead = space.without(ahead)
            return space.both([ahead, rest])
        if isinstance(tree, Anchor):
            if tree.at == "end":
                return space.empty if rest.nullable else space.none
            if not start:
                raise UnsupportedError(
                    "A regular expression has a '^' that is not at its start: take it out."
                )
            return rest
        return self._repeated(tree, rest)

    def _repeated(self, tree: Repeat, rest: Node) -> Node:
        space = self._space
        if not _looks(tree.part):
            part = self._build(tree.part, space.empty, start=False)
            return space.then(space.repeat(part, tree.low, tree.high), rest)
        if (tree.low, tree.high) not in ((0, 1), (1, 1)):
            raise UnsupportedError(
                "A regular expression repeats a group that looks ahead or has an anchor: "
                "write it without."
            )
        once = self._build(tree.part, rest, start=False)
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
