"""Regular languages as expressions with derivatives, so that an automaton can be walked by need.

An expression stands for a set of symbol strings. Symbols 0 to 255 are bytes, those from 256 on are
control tokens (see `vocabulary`). The derivative of an expression by a symbol is what may follow
that symbol; derivatives that are equal are one object, and so a state of a deterministic automaton.
Intersection and complement cost nothing extra, and a counted repetition is one node.

Source: Brzozowski, "Derivatives of Regular Expressions", JACM 1964; Owens, Reppy and Turon,
"Regular-expression derivatives re-examined", JFP 2009.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, cast

from mlx_dgemma.errors import LanguageError

SYMBOLS = 272
EVERYTHING = (1 << SYMBOLS) - 1
# Expressions that one language may need, the states met while it is walked included.
MOST_EXPRESSIONS = 60_000
# Expressions and moves that may be looked at before it is walked; five million take four seconds
# here. Counted, not timed: a busy machine refuses nothing.
MOST_WORK = 5_000_000
# Alternatives that are pursued at once, which a subset construction multiplies.
_MOST_ALTERNATIVES = 5_000


class Node:
    """One expression of a Space. nullable: whether it holds the empty string.

    mask: the symbols of a set, or those a word may begin with.
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


UNBOUNDED = -1  # the upper bound of a repetition without one


class Space:
    """Expressions that share their parts; every constructor simplifies what it is given."""

    def __init__(self, most: int = MOST_EXPRESSIONS) -> None:
        self._known: dict[tuple[object, ...], Node] = {}
        self._most = most
        self._work, self._most_work = 0, float("inf")
        self.none = self._make("none", (), False, 0)
        self.empty = self._make("empty", (), True, 0)
        self.anything = self.repeat(self.symbols(EVERYTHING), 0)

    def __len__(self) -> int:
        return len(self._known)

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """LanguageError where what is made inside takes more than MOST_WORK."""
        self._most_work = self._work + MOST_WORK
        try:
            yield
        finally:
            self._most_work = float("inf")

    def _charge(self, count: int) -> None:
        self._work += count
        if self._work > self._most_work:
            raise LanguageError("The constraint takes too long to prepare: make it simpler.")

    def symbols(self, mask: int) -> Node:
        """One symbol of the mask."""
        return self._make("set", (), False, mask) if mask else self.none

    def text(self, text: str | bytes) -> Node:
        """Exactly this text, in UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        return self.sequence([self.symbols(1 << byte) for byte in data])

    def sequence(self, parts: Sequence[Node]) -> Node:
        result = self.empty
        for part in reversed(parts):
            result = self.then(part, result)
        return result

    def then(self, first: Node, second: Node) -> Node:
        """One after the other. Of a sequence the first part stands alone, the rest in the second
        place; the parts of a long text are not a matter of recursion."""
        parts = []
        while first.kind == "then":
            parts.append(first.children[0])
            first = first.children[1]
        for part in (first, *reversed(parts)):
            second = self._pair(part, second)
        return second

    def _pair(self, first: Node, second: Node) -> Node:
        if first is self.none or second is self.none:
            return self.none
        if first is self.empty:
            return second
        if second is self.empty:
            return first
        mask = first.mask | (second.mask if first.nullable else 0)
        return self._make("then", (first, second), first.nullable and second.nullable, mask)

    def either(self, parts: Iterable[Node]) -> Node:
        """Any of the parts; those that begin with the same symbol alone share it."""
        chosen: dict[int, Node] = {}
        singles = 0
        for part in parts:
            for one in part.children if part.kind == "either" else (part,):
                if one.kind == "set":
                    singles |= one.mask
                elif one is not self.none:
                    chosen[one.number] = one
        if self.anything.number in chosen:
            return self.anything
        if singles:
            single = self.symbols(singles)
            chosen[single.number] = single
        self._charge(len(chosen) // 4)
        if len(chosen) > _MOST_ALTERNATIVES:
            raise LanguageError(
                f"The constraint has more than {_MOST_ALTERNATIVES} alternatives at once: "
                "make it simpler."
            )
        if not chosen:
            return self.none
        if len(chosen) == 1:
            return next(iter(chosen.values()))
        ordered = tuple(chosen[number] for number in sorted(chosen))
        mask = 0
        for one in ordered:
            mask |= one.mask
        return self._make("either", ordered, any(one.nullable for one in ordered), mask)

    def choice(self, texts: Iterable[Sequence[int]]) -> Node:
        """One of the symbol strings, as a tree of their beginnings."""
        tree: dict[int, object] = {}
        end = -1
        for text in texts:
            at = tree
            for byte in text:
                at = cast("dict[int, object]", at.setdefault(byte, {}))
            at[end] = True
        return self._tree(tree, end)

    def _tree(self, tree: dict[int, object], end: int) -> Node:
        order, stack = [], [tree]
        while stack:
            branch = stack.pop()
            order.append(branch)
            stack += [cast("dict[int, object]", b) for k, b in branch.items() if k != end]
        built: dict[int, Node] = {}
        for branch in reversed(order):
            parts = [self.empty] if end in branch else []
            for byte, inner in branch.items():
                if byte != end:
                    parts.append(self.then(self.symbols(1 << byte), built[id(inner)]))
            built[id(branch)] = self.either(parts)
        return built[id(tree)]

    def repeat(self, part: Node, low: int = 0, high: int = UNBOUNDED) -> Node:
        """`part`, low to high times."""
        if high != UNBOUNDED and high < low:
            return self.none
        if high == 0 or part is self.empty:
            return self.empty
        if part is self.none:
            return self.none if low else self.empty
        if low == high == 1:
            return part
        if part.nullable:
            low = 0
        return self._make("repeat", (part,), low == 0, part.mask, low, high)

    def optional(self, part: Node) -> Node:
        return self.either([part, self.empty])

    def both(self, parts: Iterable[Node]) -> Node:
        """The words that all of the parts hold."""
        chosen: dict[int, Node] = {}
        for part in parts:
            for one in part.children if part.kind == "both" else (part,):
                if one is not self.anything:
                    chosen[one.number] = one
        if self.none.number in chosen:
            return self.none
        if not chosen:
            return self.anything
        ordered = tuple(chosen[number] for number in sorted(chosen))
        if len(ordered) == 1:
            return ordered[0]
        nullable, mask = all(one.nullable for one in ordered), EVERYTHING
        for one in ordered:
            mask &= one.mask
        if not mask:
            return self.empty if nullable else self.none
        return self._make("both", ordered, nullable, mask)

    def without(self, part: Node) -> Node:
        """Every string of symbols that `part` does not hold."""
        if part is self.none:
            return self.anything
        if part is self.anything:
            return self.none
        if part.kind == "without":
            return part.children[0]
        return self._make("without", (part,), not part.nullable, EVERYTHING)

    def multiple(self, divisor: int, rest: int = 0, *, begun: bool = False) -> Node:
        """Decimal digits of a multiple of `divisor`, after digits that leave the remainder."""
        digits = ((1 << 10) - 1) << ord("0")
        nullable = begun and rest == 0
        return self._make("multiple", (), nullable, digits, divisor, rest + divisor * begun)

    # Walking

    def moves(self, node: Node) -> list[Move]:
        """Where each symbol leads, as disjoint masks; symbols of no mask lead nowhere."""
        if node.moves is None:
            joined: dict[int, int] = {}
            targets: dict[int, Node] = {}
            for mask, target in self._MOVES[node.kind](self, node):
                if target is not self.none:
                    joined[target.number] = joined.get(target.number, 0) | mask
                    targets[target.number] = target
            node.moves = [Move(mask, targets[number]) for number, mask in joined.items()]
        return node.moves

    # Moves, kind by kind

    def _of_set(self, node: Node) -> list[Move]:
        return [Move(node.mask, self.empty)]

    def _of_nothing(self, node: Node) -> list[Move]:
        return []

    def _of_then(self, node: Node) -> list[Move]:
        first, second = node.children
        ahead = [Move(mask, self.then(target, second)) for mask, target in self.moves(first)]
        if not first.nullable:
            return ahead
        return self._joined([ahead, self.moves(second)])

    def _of_either(self, node: Node) -> list[Move]:
        return self._joined([self.moves(child) for child in node.children])

    def _of_repeat(self, node: Node) -> list[Move]:
        (part,) = node.children
        high = UNBOUNDED if node.high == UNBOUNDED else node.high - 1
        rest = self.repeat(part, max(node.low - 1, 0), high)
        return [Move(mask, self.then(target, rest)) for mask, target in self.moves(part)]

    def _of_both(self, node: Node) -> list[Move]:
        found = self.moves(node.children[0])
        for child in node.children[1:]:
            found = [
                Move(mask & other, self.both([target, aim]))
                for mask, target in found
                for other, aim in self.moves(child)
                if mask & other
            ]
        return found

    def _of_without(self, node: Node) -> list[Move]:
        left, found = EVERYTHING, []
        for mask, target in self.moves(node.children[0]):
            found.append(Move(mask, self.without(target)))
            left &= ~mask
        return [*found, Move(left, self.anything)] if left else found

    def _of_multiple(self, node: Node) -> list[Move]:
        divisor = node.low
        return [
            Move(1 << (ord("0") + digit), self.multiple(divisor, rest, begun=True))
            for digit in range(10)
            for rest in [(node.high % divisor * 10 + digit) % divisor]
        ]

    def _joined(self, several: list[list[Move]]) -> list[Move]:
        """Where any of the parts goes, symbol by symbol."""
        parts: list[tuple[int, list[Node]]] = []
        for moves in several:
            for mask, target in moves:
                self._charge(len(parts) // 4)
                rest, split = mask, []
                for known, targets in parts:
                    common = known & rest
                    if not common:
                        split.append((known, targets))
                        continue
                    if known & ~common:
                        split.append((common, [*targets, target]))
                        split.append((known & ~common, targets))
                    else:  # the same list again: copies of long ones took most of the time
                        targets.append(target)
                        split.append((common, targets))
                    rest &= ~common
                if rest:
                    split.append((rest, [target]))
                parts = split
        return [Move(mask, self.either(targets)) for mask, targets in parts]

    _MOVES: ClassVar[dict[str, Callable[[Space, Node], list[Move]]]] = {
        "none": _of_nothing,
        "empty": _of_nothing,
        "set": _of_set,
        "then": _of_then,
        "either": _of_either,
        "repeat": _of_repeat,
        "both": _of_both,
        "without": _of_without,
        "multiple": _of_multiple,
    }

    def _make(
        self,
        kind: str,
        children: tuple[Node, ...],
        nullable: bool,
        mask: int,
        low: int = 0,
        high: int = 0,
    ) -> Node:
        self._charge(1)
        key = (kind, *(child.number for child in children), -1, low, high)
        if kind in ("set", "none", "empty"):
            key = (kind, mask)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= self._most:
                raise LanguageError(
                    f"The constraint needs more than {self._most} expressions: make it simpler."
                )
            found = Node(len(self._known), kind, children, nullable, mask, low, high)
            self._known[key] = found
        return found
