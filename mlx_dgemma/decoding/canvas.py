"""What a canvas starts from: noise, a draft to revise, and positions whose ids are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.draws import Draws, Place
from mlx_dgemma.errors import InputError

if TYPE_CHECKING:
    from mlx_dgemma.decoding.canvas_constraint import CanvasConstraint, Span

# What a batch pins: ids int32 [B, C] and a mask bool [B, C].
PinArrays = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Pins:
    """Canvas positions whose ids are known and never change.

    ids: int32 [C]; only the pinned positions are read.
    mask: bool [C]; True where the id is pinned.
    """

    ids: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        if self.ids.shape != self.mask.shape or self.ids.ndim != 1:
            raise ValueError(
                f"pins need two vectors of one length: {self.ids.shape=} {self.mask.shape=}"
            )

    @classmethod
    def from_template(cls, template: Sequence[int | None]) -> Pins:
        """Pins the integers of `template`; None marks a free position."""
        mask = np.array([token is not None for token in template], dtype=bool)
        ids = np.array([token or 0 for token in template])  # `initial` looks at what they are
        return cls(ids, mask)


@dataclass(frozen=True)
class Start:
    """A draft to revise instead of noise.

    ids: int32 [C].
    strength: 0 keeps the draft, 1 ignores it. In between, each free position keeps its id
        with probability 1 - strength, and denoising enters the temperature schedule at
        step ceil(strength * N).
    """

    ids: np.ndarray
    strength: float

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise InputError(
                f"strength={self.strength!r} is not possible: use 0 (keep) to 1 (noise)."
            )

    def first_step(self, steps: int) -> int:
        return math.ceil(self.strength * steps)


@dataclass(frozen=True)
class Opening:
    """How a reply must begin, on its first canvases.

    ids: pinned one after the other. following: the ids of which the next position takes one;
        empty leaves it free.
    """

    ids: tuple[int, ...]
    following: tuple[int, ...] = ()

    def on(self, canvas: CanvasRequest, start: int, length: int) -> CanvasRequest:
        """`canvas`, `length` positions from the reply's position `start` on, with its part."""
        here = self.ids[start : start + length]
        next_free = len(self.ids) - start
        if here:
            canvas = replace(
                canvas, pins=Pins.from_template([*here, *[None] * (length - len(here))])
            )
        if self.following and 0 <= next_free < length:
            options = np.array(sorted(self.following), dtype=np.int32)
            canvas = replace(canvas, allowed={**canvas.allowed, next_free: options})
        return canvas


@dataclass(frozen=True)
class CanvasRequest:
    """One row of a batch: where its random numbers come from and what is known beforehand.

    allowed: canvas position -> ids int32 [n], the only ones that position may take in draft
        and sample. The self-conditioning signal is not restricted.
    constraint: the language that the canvas' text must belong to; pins may lie in it, `allowed`
        does not go with it. spans: parts of the canvas with a language each, in place of one.
    """

    draws: Draws
    pins: Pins | None = None
    start: Start | None = None
    allowed: Mapping[int, np.ndarray] = field(default_factory=dict)
    constraint: CanvasConstraint | None = None
    spans: tuple[Span, ...] = ()

    @property
    def held(self) -> bool:
        """Whether anything on the canvas is held to a language."""
        return self.constraint is not None or bool(self.spans)

    def initial(self, place: Place, length: int, vocab_size: int) -> mx.array:
        """int32 [length]: noise, or the draft with some positions noised; pins laid on top.

        Raises InputError for known ids outside the vocabulary, which no gather may see.
        """
        known = [] if self.pins is None else [self.pins.ids[self.pins.mask]]
        known += [] if self.start is None else [self.start.ids]
        for ids in (*known, *self.allowed.values()):
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise InputError(
                    f"Token ids of a canvas must be between 0 and {vocab_size - 1}, not "
                    f"{ids.max() if ids.max() >= vocab_size else ids.min()}."
                )
        canvas = self.draws.canvas(place, length, vocab_size)
        if self.start is not None:
            kept = self.draws.keep(place, length) >= self.start.strength
            canvas = mx.where(kept, mx.array(self.start.ids), canvas)
        if self.pins is not None:
            canvas = mx.where(mx.array(self.pins.mask), mx.array(self.pins.ids), canvas)
        return canvas


def stack_pins(rows: Sequence[CanvasRequest], length: int) -> PinArrays | None:
    """The pins of a batch, or None when no row pins anything."""
    if all(row.pins is None for row in rows):
        return None
    free = Pins(np.zeros(length, np.int32), np.zeros(length, bool))
    pins = [row.pins or free for row in rows]
    return (
        mx.array(np.stack([pin.ids for pin in pins])),
        mx.array(np.stack([pin.mask for pin in pins])),
    )


def pinned_positions(rows: Sequence[CanvasRequest], length: int) -> np.ndarray:
    """bool [B, C]: which positions are pinned, on the host."""
    none = np.zeros(length, dtype=bool)
    return np.stack([none if row.pins is None else row.pins.mask for row in rows])
