"""The length of a shortest word of an expression: what a reply must have room for.

Source: A* over derivatives, for what the parts of an expression do not tell.
"""

from __future__ import annotations

import heapq
from typing import cast

from mlx_dgemma.constraints.expressions import Node, Space
from mlx_dgemma.errors import LanguageError

NEVER = 1 << 40  # the least number of symbols of an empty language
_MOST_SEARCHED = 4_000  # states visited to find one word of an intersection


class HardToFindError(LanguageError):
    """A language that may have a text, for which too many states were visited."""


def shortest_length(space: Space, node: Node) -> int:
    """The symbols of a shortest word, or NEVER for an empty language."""
    stack = [node]
    while stack:
        at = stack[-1]
        waiting = [child for child in at.children if child.least is None]
        if at.least is None and waiting:
            stack += waiting
            continue
        stack.pop()
        if at.least is None:
            at.least = min(_least(space, at), NEVER)
    return cast("int", node.least)


def _least(space: Space, node: Node) -> int:
    each = [cast("int", child.least) for child in node.children]
    if node.kind == "set":
        return 1
    if node.kind == "none":
        return NEVER
    if node.kind == "then":
        return sum(each)
    if node.kind == "either":
        return min(each)
    if node.kind == "repeat":
        return each[0] * node.low
    return _search(space, node)


def _search(space: Space, node: Node) -> int:
    """A shortest word of an intersection or complement, which its parts do not tell."""
    if node.kind == "both" and max(cast("int", c.least) for c in node.children) >= NEVER:
        return NEVER
    best: dict[int, tuple[int, Node | None]] = {node.number: (0, None)}  # how far, and from where
    # Of ways that promise the same, the one that has come farthest is followed first.
    queue = [(_bound(space, node), 0, node.number, node)]
    done: set[int] = set()
    while queue:
        _, ahead, number, at = heapq.heappop(queue)
        far = -ahead
        if number in done:
            continue
        if at.least is not None and (at.nullable or at.least < NEVER):
            return _settle(best, at, far + at.least)
        done.add(number)
        if len(done) > _MOST_SEARCHED:
            raise HardToFindError(
                "The constraint joins conditions for which no text was found in "
                f"{_MOST_SEARCHED} states: make it simpler."
            )
        for _, target in space.moves(at):
            space.charge(1 + len(target.children))
            known, _ = best.get(target.number, (NEVER, None))
            if far + 1 < known and _bound(space, target) < NEVER:
                best[target.number] = far + 1, at
                bound = far + 1 + _bound(space, target)
                heapq.heappush(queue, (bound, ahead - 1, target.number, target))
    return NEVER


def _settle(best: dict[int, tuple[int, Node | None]], end: Node, total: int) -> int:
    """The length of a word, which is that of the rest for every expression on the way."""
    at: Node | None = end
    while at is not None:
        far, before = best[at.number]
        at.least = total - far
        at = before
    return total


def _bound(space: Space, node: Node) -> int:
    """No more than the least symbols of a word."""
    if node.least is not None:
        return node.least
    if node.kind == "both":
        return max(_bound(space, child) for child in node.children)
    if node.kind in ("without", "multiple"):
        return 1
    if node.kind in ("then", "either") and any(c.kind != "set" for c in node.children):
        return 0 if node.nullable else 1
    return shortest_length(space, node)
