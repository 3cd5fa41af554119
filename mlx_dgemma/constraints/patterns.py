"""Regular expressions, as ECMAScript, Python and JSON Schema write them, read into trees.

Classes, groups, alternatives, counted and lazy repeats, lookaheads, and the anchors ^ and $ at the
ends. Groups capture nothing. What no regular language can say (a back reference) or what this
module leaves out (lookbehind, \\b, \\p) is refused by name.

Where the dialects differ about a class, the set is one that all of them accept: \\d, \\w and \\s
are ASCII, what they exclude in \\D, \\W, \\S and [^...] is all of Unicode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_dgemma.constraints.characters import ANY, DIGIT, LAST, SPACE, WORD, Characters, Range
from mlx_dgemma.constraints.expressions import UNBOUNDED
from mlx_dgemma.errors import LanguageError, UnsupportedError

MOST_CHARACTERS = 20_000
MOST_REPEATS = 10_000
_MOST_DEPTH = 60
_BEYOND_ASCII = Characters([(0x80, LAST)])
_LINE_ENDS = Characters.of("\n\r\u2028\u2029")
_NAMED = {"d": DIGIT, "w": WORD, "s": SPACE}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_HEX_DIGITS = {"x": 2, "u": 4}
_HEX = frozenset("0123456789abcdefABCDEF")


@dataclass(frozen=True)
class Set:
    """One character."""

    characters: Characters


@dataclass(frozen=True)
class Repeat:
    part: Tree
    low: int
    high: int


@dataclass(frozen=True)
class Row:
    """One after the other."""

    parts: tuple[Tree, ...]


@dataclass(frozen=True)
class Options:
    parts: tuple[Tree, ...]


@dataclass(frozen=True)
class Look:
    """What must, or must not, follow here."""

    part: Tree
    wanted: bool


@dataclass(frozen=True)
class Anchor:
    at: Literal["start", "end"]


Tree = Set | Repeat | Row | Options | Look | Anchor


def parse(pattern: str) -> Tree:
    """The tree of a pattern; LanguageError says what is wrong with it and where."""
    if not isinstance(pattern, str):
        raise LanguageError(f"A regular expression is text, not {pattern!r:.40}.")
    if len(pattern) > MOST_CHARACTERS:
        raise LanguageError(
            f"The regular expression has {len(pattern)} characters; {MOST_CHARACTERS} are the most."
        )
    return _Parser(pattern).whole()


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.fold = False

    def whole(self) -> Tree:
        if self.pattern.startswith("(?i)"):
            self.at, self.fold = 4, True
        tree = self.options(0)
        if self.at < len(self.pattern):
            raise self.fail("has a ')' without a '('")
        return tree

    def fail(self, why: str, kind: type[LanguageError] = LanguageError) -> LanguageError:
        shown = self.pattern if len(self.pattern) <= 60 else f"{self.pattern[:57]}..."
        return kind(
            f"The regular expression {shown!r} {why}, at character {self.at}: change it there."
        )

    def options(self, depth: int) -> Tree:
        if depth > _MOST_DEPTH:
            raise self.fail(f"nests more than {_MOST_DEPTH} groups")
        rows = [self.row(depth)]
        while self.take("|"):
            rows.append(self.row(depth))
        return rows[0] if len(rows) == 1 else Options(tuple(rows))

    def row(self, depth: int) -> Tree:
        parts: list[Tree] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            parts.append(self.repeated(self.atom(depth)))
        return parts[0] if len(parts) == 1 else Row(tuple(parts))

    def repeated(self, part: Tree) -> Tree:
        while (bounds := self.bounds()) is not None:
            if isinstance(part, Anchor | Look):
                raise self.fail("repeats what has no length")
            low, high = bounds
            if max(low, high) > MOST_REPEATS:
                raise self.fail(f"repeats something more than {MOST_REPEATS} times")
            if high != UNBOUNDED and high < low:
                raise self.fail("has a repeat whose bounds are in the wrong order")
            if self.take("+"):
                raise self.fail("has a possessive repeat", UnsupportedError)
            self.take("?")  # lazy: the same texts
            part = Repeat(part, low, high)
        return part

    def bounds(self) -> tuple[int, int] | None:
        for sign, bounds in (("*", (0, UNBOUNDED)), ("+", (1, UNBOUNDED)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        end = self.pattern.find("}", self.at)
        if self.peek() != "{" or end < 0:
            return None
        low, comma, high = self.pattern[self.at + 1 : end].partition(",")
        digits = all(not part or (part.isascii() and part.isdigit()) for part in (low, high))
        if not digits or not (low or high):
            return None  # an ordinary brace
        if len(low) > 6 or len(high) > 6:
            raise self.fail(f"repeats something more than {MOST_REPEATS} times")
        self.at = end + 1
        least = int(low or 0)
        return least, least if not comma else (int(high) if high else UNBOUNDED)

    def atom(self, depth: int) -> Tree:
        sign = self.pattern[self.at]
        if sign in "*+?":
            raise self.fail(f"has nothing before {sign!r}")
        self.at += 1
        if sign == "(":
            return self.group(depth)
        if sign == "[":
            return Set(self.members())
        if sign == ".":
            return Set(ANY - _LINE_ENDS)
        if sign in "^$":
            return Anchor("start" if sign == "^" else "end")
        if sign == "\\":
            return self.escaped()
        return Set(self.folded(Characters.of(sign)))

    def group(self, depth: int) -> Tree:
        look: bool | None = None
        if self.take("?"):
            if self.take("=") or self.take("!"):
                look = self.pattern[self.at - 1] == "="
            elif self.pattern.startswith(("<=", "<!"), self.at):
                raise self.fail("looks behind, which this runtime cannot do", UnsupportedError)
            elif self.take("P<") or self.take("<"):
                end = self.pattern.find(">", self.at)
                if end < 0:
                    raise self.fail("has a group name without an end")
                self.at = end + 1
            elif not self.take(":"):
                raise self.fail("has a group this runtime does not know", UnsupportedError)
        inner = self.options(depth + 1)
        if not self.take(")"):
            raise self.fail("has a '(' without a ')'")
        return inner if look is None else Look(inner, look)

    def escaped(self) -> Tree:
        sign = self.peek()
        if sign in ("A", "Z", "z"):
            self.at += 1
            return Anchor("start" if sign == "A" else "end")
        return Set(self.folded(self.escape(inside=False)[0]))

    def escape(self, *, inside: bool) -> tuple[Characters, Characters]:
        """What stands after a backslash: the characters meant, and those a [^...] leaves out."""
        sign = self.peek()
        if not sign:
            raise self.fail("ends in a backslash")
        self.at += 1
        if sign.lower() in _NAMED:
            narrow = _NAMED[sign.lower()]
            wide = narrow | _BEYOND_ASCII
            return (narrow, wide) if sign.islower() else (~wide, ~narrow)
        if sign == "0" and self.peek().isdecimal():
            raise self.fail("uses an octal code: write it as \\x and two digits", UnsupportedError)
        if sign in _CONTROLS or (inside and sign == "b"):
            one = Characters.of(_CONTROLS.get(sign, "\b"))
        elif sign in _HEX_DIGITS:
            one = self.code_point(_HEX_DIGITS[sign])
        elif sign.isalnum():
            raise self.fail(f"uses \\{sign}, which this runtime does not know", UnsupportedError)
        else:
            one = Characters.of(sign)
        return one, one

    def code_point(self, count: int) -> Characters:
        end = self.at + count
        digits = self.pattern[self.at : end]
        if count == 4 and self.take("{"):
            end = self.pattern.find("}", self.at) + 1
            digits = self.pattern[self.at : max(end - 1, self.at)]
        point = int(digits, 16) if set(digits) <= _HEX and 0 < len(digits) <= 8 else LAST + 1
        if point > LAST or end > len(self.pattern):
            raise self.fail("has a code that is no character")
        self.at = end
        return Characters([(point, point)])

    def members(self) -> Characters:
        negated = self.take("^")
        narrow: list[Range] = []
        wide: list[Range] = []
        first = True
        while first or self.peek() != "]":
            if not self.peek():
                raise self.fail("has a '[' without a ']'")
            if first and self.peek() == "]" and not negated:
                break  # ECMAScript: an empty class
            first = False
            some, excluded = self.member()
            narrow += some.ranges
            wide += excluded.ranges
        self.at += 1
        chosen = ~self.every_case(Characters(wide)) if negated else self.folded(Characters(narrow))
        if not chosen:
            raise self.fail("has a class without a character", UnsupportedError)
        return chosen

    def member(self) -> tuple[Characters, Characters]:
        begin = self.one_member()
        follows = self.pattern[self.at + 1 : self.at + 2]
        if self.peek() != "-" or follows in ("]", ""):
            return begin
        self.at += 1
        end = self.one_member()
        points = [r for some in (begin[0], end[0]) for r in some.ranges]
        if len(points) != 2 or any(first != last for first, last in points):
            raise self.fail("has a range between what are no characters")
        if points[1][0] < points[0][0]:
            raise self.fail("has a range in the wrong order")
        run = Characters([(points[0][0], points[1][0])])
        return run, run

    def one_member(self) -> tuple[Characters, Characters]:
        if self.take("\\"):
            return self.escape(inside=True)
        one = Characters.of(self.peek())
        self.at += 1
        return one, one

    def folded(self, characters: Characters) -> Characters:
        """With (?i), the letters that every dialect takes for the same."""
        return characters.folded() if self.fold else characters

    def every_case(self, characters: Characters) -> Characters:
        """With (?i), the letters that any dialect takes for the same."""
        return characters.every_case() if self.fold else characters

    def take(self, text: str) -> bool:
        if self.pattern.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]


def begins_anchored(tree: Tree) -> bool:
    """Whether every text of the tree starts where the search does."""
    if isinstance(tree, Options):
        return all(begins_anchored(part) for part in tree.parts)
    if isinstance(tree, Row):
        return bool(tree.parts) and begins_anchored(tree.parts[0])
    return tree == Anchor("start")


def has_start(tree: Tree) -> bool:
    """Whether a ^ is somewhere in the tree."""
    if isinstance(tree, Options | Row):
        return any(map(has_start, tree.parts))
    return has_start(tree.part) if isinstance(tree, Repeat | Look) else tree == Anchor("start")


def may_be_empty(tree: Tree) -> bool:
    """Whether the tree may match no character at all."""
    if isinstance(tree, Options):
        return any(map(may_be_empty, tree.parts))
    if isinstance(tree, Row):
        return all(map(may_be_empty, tree.parts))
    if isinstance(tree, Repeat):
        return tree.low == 0 or may_be_empty(tree.part)
    return not isinstance(tree, Set)


def alternatives(tree: Tree) -> Sequence[Tree]:
    return tree.parts if isinstance(tree, Options) else (tree,)
