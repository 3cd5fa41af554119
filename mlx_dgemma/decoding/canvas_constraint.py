"""The language that a canvas must belong to, and the marginals that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_dgemma.constraints.constraint import Language

if TYPE_CHECKING:
    from mlx_dgemma.model import Model

_ROWS = 32  # positions whose embeddings are gathered together


@dataclass(frozen=True)
class CanvasConstraint:
    """What a canvas' text must lead on to. state: of the language's automaton where it begins.

    left: tokens that the reply may still have. more: whether another canvas may follow.
    """

    language: Language
    state: int
    left: int
    more: bool

    @property
    def opener(self) -> int | None:
        """An id without which every canvas leads on as it must."""
        free = self.state == self.language.automaton.start
        return self.language.opener if free else None

    def ends_by(self, length: int) -> int | None:
        """Positions within which the text must end: the stop id may stand after the last token."""
        if self.left < length:
            return self.left + 1
        return None if self.more and self.left > length else length


@dataclass(frozen=True)
class Span:
    """Canvas positions [start, end) that must hold one whole text of a language."""

    language: Language
    start: int
    end: int


@dataclass(frozen=True)
class Mixture:
    """Marginals: `plain` float32 [b, C] times the network's distribution, plus `weights` float32
    [b, C, n] of `ids` int32 [b, C, n]."""

    plain: mx.array
    ids: mx.array
    weights: mx.array

    def signal(self, model: Model, soft: mx.array) -> mx.array:
        """The soft embeddings [b, C, H] of the marginals, given those of the network."""
        table, scale = model.embedding_matrix, model.embed_scale
        count = self.ids.shape[-1]
        ids, weights = self.ids.reshape(-1, count), self.weights.reshape(-1, count)
        parts = []
        for first in range(0, ids.shape[0], _ROWS):
            rows = table.take(ids[first : first + _ROWS]).astype(mx.float32)
            parts.append((weights[first : first + _ROWS, None] @ rows)[:, 0] * scale)
        own = mx.concatenate(parts).reshape(soft.shape)
        return (self.plain[..., None] * soft.astype(mx.float32) + own).astype(soft.dtype)
