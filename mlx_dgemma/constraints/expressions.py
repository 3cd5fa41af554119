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
from itertools import chain
from operator import attrgetter
from typing import ClassVar, cast

from mlx_dgemma.constraints.nodes import Move, Node, branches
from mlx_dgemma.errors import LanguageError

__all__ = ["EVERYTHING", "SYMBOLS", "UNBOUNDED", "Move", "Node", "Space"]

SYMBOLS = 272
EVERYTHING = (1 << SYMBOLS) - 1
# Expressions that one language may need, the states met while it is walked included.
MOST_EXPRESSIONS = 60_000
# What may be looked at before it is walked: under a second here, a third of it for a hundred tools
# of a dozen parameters. Counted, not timed: a busy machine refuses nothing.
MOST_WORK = 300_000
_NEW = 2  # what a new expression counts more than one that is known
# Alternatives that are pursued at once, which a subset construction multiplies.
_MOST_ALTERNATIVES = 5_000
_MANY = 8_000  # symbols of a choice from which on it is not built as a whole
_DIGITS, _POINT = ((1 << 10) - 1) << ord("0"), 1 << ord(".")
_NUMBER = attrgetter("number")
UNBOUNDED = -1  # the upper bound of a repetition without one


class Space:
    """Expressions that share their parts; every constructor simplifies what it is given."""

    def __init__(self, most: int = MOST_EXPRESSIONS) -> None:
        self._known: dict[tuple[object, ...], Node] = {}
        self._most = most
        self._lists: list[list[tuple[int, ...]]] = []
        self._ranges: list[tuple[int, int, int, int]] = []
        self._places: dict[tuple[int, ...], int] = {}
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

    def charge(self, count: int) -> None:
        """Counts what was looked at; LanguageError where `bounded` allows no more."""
        self._work += count
        if self._work > self._most_work:
            raise LanguageError("The constraint takes too long to prepare: make it simpler.")

    def symbols(self, mask: int) -> Node:
        """One symbol of the mask."""
        return self._make("set", (), False, mask) if mask else self.none

    def text(self, text: str | bytes) -> Node:
        """Exactly this text, in UTF-8; none where it has half of a surrogate pair."""
        try:
            data = text.encode() if isinstance(text, str) else text
        except UnicodeEncodeError:
            return self.none
        return self.sequence([self.symbols(1 << byte) for byte in data])

    def sequence(self, parts: Sequence[Node]) -> Node:
        result = self.empty
        for part in reversed(parts):
            result = self.then(part, result)
        return result

    def then(self, first: Node, second: Node) -> Node:
        """One after the other. Of a sequence the first part stands alone, the rest in the second
        place; the parts of a long text are not a matter of recursion."""
        if second is self.empty:
            return first
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
        singles = mask = 0
        nullable = False
        for part in parts:
            mask |= part.mask
            nullable = nullable or part.nullable
            if part.kind == "either":  # at once, for it may have thousands
                chosen.update(zip(map(_NUMBER, part.children), part.children, strict=True))
                if part.low:
                    singles |= chosen.pop(part.low).mask
            elif part.kind == "set":
                singles |= part.mask
            elif part is not self.none:
                chosen[part.number] = part
        if self.anything.number in chosen:
            return self.anything
        single = self.symbols(singles)
        if singles:
            chosen[single.number] = single
        self.charge(1 + len(chosen) // 4)
        if len(chosen) > _MOST_ALTERNATIVES:
            raise LanguageError(
                f"The constraint has more than {_MOST_ALTERNATIVES} alternatives at once: "
                "make it simpler."
            )
        if not chosen:
            return self.none
        if len(chosen) == 1:
            return next(iter(chosen.values()))
        ordered = tuple(map(chosen.__getitem__, sorted(chosen)))
        return self._make("either", ordered, nullable, mask, single.number if singles else 0)

    def choice(self, texts: Iterable[Sequence[int]]) -> Node:
        """One of the symbol strings; long lists are looked at where a text reaches them."""
        listed = list(texts)
        if len(listed) == 1:
            return self.sequence([self.symbols(1 << symbol) for symbol in listed[0]])
        if sum(map(len, listed)) > _MANY:
            words = sorted({tuple(text) for text in listed})
            self._lists.append(words)
            return self._words(len(self._lists) - 1, 0, len(words), 0)
        tree: dict[int, object] = {}
        end = -1
        for text in listed:
            at = tree
            for byte in text:
                at = cast("dict[int, object]", at.setdefault(byte, {}))
            at[end] = True
        return self._tree(tree, end)

    def _words(self, number: int, low: int, high: int, depth: int) -> Node:
        """What follows the symbols that words low to high of a sorted list have in common."""
        words = self._lists[number]
        ended = len(words[low]) == depth
        if ended and high - low == 1:
            return self.empty
        mask = 0
        for at, _ in branches(words, low + ended, high, depth):
            mask |= 1 << words[at][depth]
        symbols: tuple[Node, ...] = ()
        if depth == 0:  # for whoever asks which symbols the language tells apart
            symbols = tuple(self.symbols(1 << one) for one in sorted({*chain.from_iterable(words)}))
        self.charge(mask.bit_count())
        # A single word's end is the same in whichever list it stands.
        key = (number, low, high, depth) if high - low > 1 else (-1, *words[low][depth:])
        place = self._places.setdefault(key, len(self._places))
        if place == len(self._ranges):
            self._ranges.append((number, low, high, depth))
        node = self._make("words", symbols, ended, mask, place)
        if node.least is None:
            node.least = min(map(len, words[low:high])) - depth
        return node

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
        self.charge(len(chosen))
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
        """Decimal digits of a multiple of `divisor`, after digits that leave the remainder; points
        between them say nothing."""
        nullable = begun and rest == 0
        return self._make(
            "multiple", (), nullable, _DIGITS | _POINT, divisor, rest + divisor * begun
        )

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

    def holds(self, node: Node, word: Iterable[int]) -> bool:
        """Whether the expression holds a word of symbols."""
        for symbol in word:
            self.charge(1)
            targets = (target for mask, target in self.moves(node) if mask >> symbol & 1)
            node = next(targets, self.none)
        return node.nullable

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

    def _of_words(self, node: Node) -> list[Move]:
        number, low, high, depth = self._ranges[node.low]
        words = self._lists[number]
        return [
            Move(1 << words[start][depth], self._words(number, start, end, depth + 1))
            for start, end in branches(words, low + node.nullable, high, depth)
        ]

    def _of_multiple(self, node: Node) -> list[Move]:
        divisor = node.low
        return [Move(_POINT, node)] + [
            Move(1 << (ord("0") + digit), self.multiple(divisor, rest, begun=True))
            for digit in range(10)
            for rest in [(node.high % divisor * 10 + digit) % divisor]
        ]

    def _joined(self, several: list[list[Move]]) -> list[Move]:
        """Where any of the parts goes, symbol by symbol."""
        parts: list[tuple[int, list[Node]]] = []
        for moves in several:
            for mask, target in moves:
                self.charge(len(parts) // 4)
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
        "words": _of_words,
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
        self.charge(1)
        key = (kind, *map(_NUMBER, children), -1, low, high)
        if kind in ("set", "none", "empty"):
            key = (kind, mask)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= self._most:
                raise LanguageError(
                    f"The constraint needs more than {self._most} expressions: make it simpler."
                )
            self.charge(_NEW)
            found = Node(len(self._known), kind, children, nullable, mask, low, high)
            self._known[key] = found
        return found
