"""Literals and holes become one canvas: pinned ids, free positions, and healed edges.

A literal that ends inside a word, or in the space before one, would force a token boundary that
the model never saw. So the last token of such a literal joins the hole, and the hole's first
token must begin with its text; likewise on the right. What stands outside the holes is thereby
the same characters whatever is filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from mlx_dgemma.constraints import Constraint, Language
from mlx_dgemma.decoding.canvas import Pins
from mlx_dgemma.decoding.canvas_constraint import Span
from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.holes import Hole
from mlx_dgemma.prompt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Slot:
    """A hole on the canvas: positions [start, end)."""

    start: int
    end: int


@dataclass(frozen=True)
class Template:
    """One canvas before denoising.

    ids: a token, or None where it is to be found. slots: the holes. allowed: canvas position
    -> the only ids it may take. spans: holes that are held to a language, edges included. filler:
    pinned after the ids; None cuts the canvas there.
    unseen: tokens of right context that the canvas had no room for.
    """

    ids: tuple[int | None, ...]
    slots: tuple[Slot, ...]
    allowed: dict[int, np.ndarray] = field(default_factory=dict)
    filler: int | None = None
    unseen: int = 0
    spans: tuple[Span, ...] = ()

    def length(self, canvas_length: int) -> int:
        """Positions to denoise: the whole canvas with filler, else just what is needed."""
        return canvas_length if self.filler is not None else len(self.ids)

    def pins(self, canvas_length: int) -> Pins:
        rest = self.length(canvas_length) - len(self.ids)
        return Pins.from_template([*self.ids, *[self.filler] * rest])


class Layout:
    """Every literal of a text as ids, with what healing takes off its edges.

    before[i], after[i]: the text of the tokens that hole i took over on its left and right.
    A hole that may end early, with pads, takes over none on its right (`right` False).
    vocabulary: ids of the network, where they are more than the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        literals: Sequence[str],
        holes: Sequence[Hole] = (),
        *,
        right: bool = True,
        vocabulary: int | None = None,
    ) -> None:
        self.texts = token_texts(tokenizer)
        self.literals = [tokenizer.encode(literal) for literal in literals]
        self.before: list[str] = []
        self.after: list[str] = []
        for index in range(len(literals) - 1):
            self.before.append(self._take_last(self.literals[index], literals[index]))
            following = self.literals[index + 1]
            self.after.append(self._take_first(following, literals[index + 1]) if right else "")
        self.languages = {
            index: _language(
                tokenizer,
                vocabulary or len(tokenizer),
                hole.constraint,
                self.before[index],
                self.after[index],
            )
            for index, hole in enumerate(holes)
            if hole.constraint is not None
        }

    def least(self, hole: int) -> int:
        """The fewest tokens a hole can have: its two edges may not fit into one token."""
        before, after = self.before[hole], self.after[hole]
        return 2 if before and after and not self.texts.spanning(before, after).size else 1

    def joined(self, hole: int) -> int:
        """Edge tokens that joined a hole: it may need a place for each, or merge with it."""
        return sum(1 for edge in (self.before[hole], self.after[hole]) if edge)

    def allowed(self, hole: int, slot: Slot) -> dict[int, np.ndarray]:
        """What the edges of a hole may hold, so that the literals' text survives."""
        before, after = self.before[hole], self.after[hole]
        last = slot.end - 1
        if hole in self.languages:
            return {}
        if slot.start == last and before and after:
            return {slot.start: self.texts.spanning(before, after)}
        edges = {}
        if before:
            edges[slot.start] = self.texts.starting(before)
        if after:
            edges[last] = self.texts.ending(after)
        return edges

    def template(
        self,
        first: int,
        lengths: Sequence[int],
        *,
        skip: int = 0,
        limit: int,
        tail: Sequence[int] = (),
        filler: int | None = None,
    ) -> Template:
        """The canvas for holes first, first + 1, ... of these lengths, at most `limit` long.

        skip: tokens of the literal before them that are in the context already. tail and
        filler follow the last literal of the whole text.
        """
        ids: list[int | None] = list(self.literals[first][skip:])
        slots: list[Slot] = []
        allowed: dict[int, np.ndarray] = {}
        for hole, length in enumerate(lengths, start=first):
            slots.append(Slot(len(ids), len(ids) + length))
            allowed |= self.allowed(hole, slots[-1])
            ids += [None] * length
            ids += self.literals[hole + 1]
        after = self.literals[first + len(lengths) + 1 :]
        if not after:
            ids += tail
        unseen = max(len(ids) - limit, 0) + sum(map(len, after))
        spans = [
            Span(self.languages[hole], slot.start, slot.end)
            for hole, slot in enumerate(slots, start=first)
            if hole in self.languages
        ]
        return Template(
            tuple(ids[:limit]), tuple(slots), allowed, None if unseen else filler, unseen,
            tuple(spans),
        )  # fmt: skip

    def _take_last(self, ids: list[int], literal: str) -> str:
        """Moves a literal's last token into the hole after it, if one could continue it."""
        if not ids or not (literal[-1].isalnum() or literal[-1].isspace()):
            return ""
        return self._take(ids, -1, self.texts.starting)

    def _take_first(self, ids: list[int], literal: str) -> str:
        """Moves a literal's first token into the hole before it, if it could be a word's end."""
        if len(ids) < 2 or not literal[0].isalnum():
            return ""
        return self._take(ids, 0, self.texts.ending)

    def _take(self, ids: list[int], at: int, matching: Callable[[str], np.ndarray]) -> str:
        text = self.texts[ids[at]]
        if not text or len(matching(text)) < 2:
            return ""
        ids.pop(at)
        return text


def _language(
    tokenizer: Tokenizer, vocabulary: int, constraint: object, before: str, after: str
) -> Language:
    """What a hole may become, the text of its edges included."""
    if not isinstance(constraint, Constraint):
        raise InputError(
            f"A hole's constraint={constraint!r:.60} is not possible: use Constraint.regex(...), "
            "Constraint.choice(...) or Constraint.json_schema(...)."
        )
    return constraint.language(tokenizer, vocabulary, before=before, after=after)


class TokenTexts:
    """What each token of a vocabulary adds to a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getitem__(self, token: int) -> str:
        return self._texts[token]

    @cached_property
    def _texts(self) -> list[str]:
        """By id; empty for control tokens and for raw bytes, which may be half a character."""
        tokenizer = self._tokenizer
        texts = [
            "" if token in tokenizer.control_ids or tokenizer.is_byte(token)
            else tokenizer.decode([token])
            for token in range(len(tokenizer))
        ]  # fmt: skip
        return ["" if "\ufffd" in text else text for text in texts]

    def starting(self, prefix: str) -> np.ndarray:
        """int32 [n]: tokens whose text begins with `prefix`."""
        return self._where(lambda text: text.startswith(prefix))

    def ending(self, suffix: str) -> np.ndarray:
        """int32 [n]: tokens whose text ends with `suffix`."""
        return self._where(lambda text: text.endswith(suffix))

    def spanning(self, prefix: str, suffix: str) -> np.ndarray:
        """int32 [n]: tokens that begin with one text and end with another, sharing no character."""
        shortest = len(prefix) + len(suffix)
        return self._where(
            lambda text: len(text) >= shortest and text.startswith(prefix) and text.endswith(suffix)
        )

    def _where(self, test: Callable[[str], bool]) -> np.ndarray:
        found = [token for token, text in enumerate(self._texts) if text and test(text)]
        return np.array(found, dtype=np.int32)


@lru_cache(maxsize=2)
def token_texts(tokenizer: Tokenizer) -> TokenTexts:
    """Read once: a vocabulary has a quarter of a million tokens."""
    return TokenTexts(tokenizer)
