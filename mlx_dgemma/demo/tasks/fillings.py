"""Texts with holes of known length: known words stay, one to three spans are to be filled in."""

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mlx_dgemma.demo.tasks import grids, words
from mlx_dgemma.demo.tasks.example import Example, Message, ask, is_held_out

PROMPT = "Fill in the blanks."
ROOMY_PROMPT = "Fill in the blanks. There may be more room than needed."  # holes end with <pad>


@dataclass(frozen=True)
class Segment:
    """A piece of the text; in a hole, `text` is one right filling and gives the hole's length."""

    text: str
    hole: bool = False


@dataclass(frozen=True)
class InfillExample:
    """Messages, the text in pieces, and `verify(whole_text)` for the text with its holes filled."""

    task: str
    messages: list[Message]
    segments: tuple[Segment, ...]
    verify: Callable[[str], bool] = field(repr=False)

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


def _valid_list(text: str) -> bool:
    items = text.split(", ")
    in_order = all(a < b for a, b in itertools.pairwise(items))
    return in_order and any(set(items) <= set(known) for known in words.WORDS.values())


# name -> (the task that gives the texts, where a text may be cut, the judge under PROMPT)
SOURCES: dict[str, tuple[Callable[[random.Random], Example], str, Callable[[str], bool]]] = {
    "sentence": (words.sentence, r" ?[A-Za-z]+|\.", words.is_sentence),
    "list": (words.word_list, r",| ?[a-z]+", _valid_list),
    "json": (words.json_record, r'[{}",: ]+|[A-Za-z]+|\d\d', words.is_record),
    "grid": (grids.grid, r"\d|\n", lambda text: grids._judge(grids.BLANK * 16, text)),
}


def _holes(pieces: list[str], rng: random.Random) -> tuple[Segment, ...]:
    """Cuts one to three spans, never the whole text, and joins neighbours of one kind."""
    hole = [False] * len(pieces)
    for _ in range(rng.choice([1, 1, 2, 3])):
        width = rng.randint(1, max(1, len(pieces) // 3))
        start = rng.randint(0, len(pieces) - width)
        hole[start : start + width] = [True] * width
    segments: list[Segment] = []
    for piece, is_hole in zip(pieces, hole, strict=True):
        if segments and segments[-1].hole == is_hole:
            segments[-1] = Segment(segments[-1].text + piece, is_hole)
        else:
            segments.append(Segment(piece, is_hole))
    return tuple(segments)


def infill_examples(rng: random.Random, *, held_out: bool = False) -> Iterator[InfillExample]:
    """Draws texts with holes for ever; held-out texts are those no infill training canvas shows."""
    while True:
        task, (draw, cut, judge) = rng.choice(list(SOURCES.items()))
        example = draw(rng)
        if is_held_out(example.answer) != held_out:
            continue
        segments = _holes(re.findall(cut, example.answer), rng)
        if rng.random() < 0.5:
            yield InfillExample(task, ask(PROMPT), segments, judge)
        else:
            yield InfillExample(task, example.messages, segments, example.verify)
