"""A draft as text: what is accepted, what is still noise, and how sure the model is.

Three things look different, in colour and without it: committed text is plain, accepted
positions are bold, noisy positions are dim, and a position too uncertain to read is a shade.
Below the text, one bar per canvas position rises to full height as its entropy falls.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby
from operator import itemgetter

import numpy as np
from rich.text import Text

from mlx_dgemma.decoding.events import Draft

ACCEPTED = "bold cyan"
NOISY = "dim italic"
SHADE = "dim"
THINKING = "dim italic"

# Entropy in nats above which the likeliest token says nothing: a shade is calmer than a word
# that changes at every step. A uniform choice among four tokens has 1.39.
UNREADABLE = 1.4
BARS = " ▁▂▃▄▅▆▇█"

Decode = Callable[[list[int]], str]


def printable(text: str) -> str:
    """`text` without the control characters that could move the cursor or recolour the screen."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c)[0] != "C")


class Pieces:
    """The text of single token ids; control tokens have none."""

    def __init__(self, decode: Decode, control_ids: Collection[int] = ()) -> None:
        self._decode = decode
        self._control = frozenset(control_ids)
        self._cache: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        piece = self._cache.get(token)
        if piece is None:
            piece = "" if token in self._control else printable(self._decode([token]))
            # A token can be a part of a character.
            piece = self._cache[token] = piece.replace("\N{REPLACEMENT CHARACTER}", "·")
        return piece


def paint(draft: Draft, pieces: Pieces, stop_ids: Collection[int]) -> Text:
    """The draft up to its first stop id, styled by position."""

    def cells() -> Iterator[tuple[str, str]]:
        for token, accepted, entropy in zip(
            draft.ids.tolist(), draft.accepted.tolist(), draft.entropy.tolist(), strict=True
        ):
            if token in stop_ids:
                return
            piece = pieces(token)
            if accepted:
                yield piece, ACCEPTED
            elif entropy > UNREADABLE:
                yield shade(piece), SHADE
            else:
                yield piece, NOISY

    return _styled(cells())


def _styled(cells: Iterable[tuple[str, str]]) -> Text:
    """(text, style) pairs as one Text; neighbours of one style are one span, which draws faster."""
    text = Text()
    for style, run in groupby(cells, key=itemgetter(1)):
        text.append("".join(piece for piece, _ in run), style)
    return text


def shade(piece: str) -> str:
    """The same shape in shades: what is not white space becomes a light block."""
    return "".join(" " if c.isspace() else "░" for c in piece)


def bars(draft: Draft, width: int) -> Text:
    """One bar per canvas position, or per group of neighbours where they do not fit.

    A full bar is an accepted position; a lower one is as high as the position is certain, on a
    logarithmic scale from uniform noise (nothing) to the entropy of a settled token.
    """
    size = draft.accepted.size
    cells = min(width, size)
    share, longer = divmod(size, cells)  # the first groups have one position more
    starts = np.arange(cells) * share + np.minimum(np.arange(cells), longer)
    certainty = np.where(draft.accepted, 1.0, _certainty(draft.entropy))
    mean = np.add.reduceat(certainty, starts) / np.diff(starts, append=size)
    settled = np.logical_and.reduceat(draft.accepted, starts)
    levels = np.where(settled, len(BARS) - 1, (mean * (len(BARS) - 2)).astype(int) + 1)
    return _styled(
        (BARS[level], ACCEPTED if whole else SHADE)
        for level, whole in zip(levels.tolist(), settled.tolist(), strict=True)
    )


def _certainty(entropy: np.ndarray) -> np.ndarray:
    """0 for 10 nats and more (a uniform choice among 22,000 tokens), near 1 below 0.01 nats."""
    nats = np.clip(np.nan_to_num(entropy, nan=10.0), 0.01, 10.0)
    certainty: np.ndarray = np.log(10.0 / nats) / np.log(1000.0) * 0.999
    return certainty
