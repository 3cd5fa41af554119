"""Some positions of every canvas of a batch: what a decoder pass computes of them, and the keys and
values of the others, as they were last computed.

Nothing here knows why a position is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.kernels.attention import Pair
from mlx_dgemma.model.rope import Table


@dataclass(frozen=True)
class Subset:
    """The positions that a pass over b canvases of C positions computes.

    positions: int64 [b, S], ascending in each canvas; one with fewer than another repeats its last.
    counts: int64 [b], how many of its S a canvas has; the repeats are computed and dropped.
    length: C.
    """

    positions: np.ndarray
    counts: np.ndarray
    length: int

    @classmethod
    def of(cls, chosen: np.ndarray) -> Subset | None:
        """The positions where `chosen` (bool [b, C], some in every canvas) is true; None if all."""
        batch, length = chosen.shape
        if chosen.all():
            return None
        counts = chosen.sum(axis=1)
        positions = np.empty((batch, int(counts.max())), dtype=np.int64)
        for line, some in enumerate(chosen):
            own = np.flatnonzero(some)
            positions[line, : own.size] = own
            positions[line, own.size :] = own[-1]
        return cls(positions, counts, length)

    @property
    def whole(self) -> np.ndarray:
        """bool [b, C]: which positions are computed."""
        found = np.zeros((len(self.counts), self.length), dtype=bool)
        np.put_along_axis(found, self.positions, True, axis=1)
        return found

    @cached_property
    def sources(self) -> np.ndarray:
        """int64 [n], of the b * S computed rows those that are no repeats."""
        width = self.positions.shape[1]
        return np.flatnonzero(np.arange(width)[None] < self.counts[:, None])

    @cached_property
    def places(self) -> np.ndarray:
        """int64 [n], where those stand among the b * C positions; ascending."""
        found: np.ndarray = self._flat.reshape(-1)[self.sources]
        return found

    @cached_property
    def _flat(self) -> np.ndarray:
        return self.positions + np.arange(len(self.counts))[:, None] * self.length

    @cached_property
    def _index(self) -> mx.array:
        return mx.array(self._flat)

    def take(self, whole: mx.array) -> mx.array:
        """[b, S, ...] of [b, C, ...]."""
        return whole.reshape(-1, *whole.shape[2:])[self._index]

    def lay_over(self, whole: mx.array, rows: mx.array) -> mx.array:
        """[b, C, ...]: `whole`, with the computed rows [b, S, ...] in their places."""
        flat = whole.reshape(-1, *whole.shape[2:])
        own = rows.reshape(-1, *rows.shape[2:])
        if self.sources.size < own.shape[0]:
            own = own[mx.array(self.sources)]
        flat[mx.array(self.places)] = own
        return flat.reshape(whole.shape)

    def tables(self, rope: Table) -> Table:
        """Rotary tables [b * S, D / 2] of the computed rows, given those [C, D / 2] of a canvas."""
        index = mx.array(self.positions.reshape(-1))
        cosine, sine = rope
        return cosine[index], sine[index]


class Kept(NamedTuple):
    """A call of `CanvasKeys.keep`."""

    lines: mx.array


class Joined(NamedTuple):
    """A call of `CanvasKeys.join`."""

    others: CanvasKeys
    own: int
    more: int


class CanvasKeys:
    """Keys and values of a batch's canvases in every layer, [b, C, kv_heads, D] each."""

    def __init__(self) -> None:
        self.layers: list[Pair] = []
        # What was done since other processes that hold other heads of it were last told.
        self.changes: list[Kept | Joined] = []

    def hold(self, layer: int, pair: Pair, subset: Subset | None) -> Pair:
        """Keys and values [b, kv_heads, C, D] of whole canvases, from here on the kept ones, given
        those of the pass at hand [b, kv_heads, S, D]."""
        keys, values = (array.swapaxes(1, 2) for array in pair)
        if subset is not None:
            old = self.layers[layer]
            keys, values = subset.lay_over(old[0], keys), subset.lay_over(old[1], values)
        if layer == len(self.layers):
            self.layers.append((keys, values))
        else:
            self.layers[layer] = keys, values
        return keys.swapaxes(1, 2), values.swapaxes(1, 2)

    def keep(self, lines: mx.array) -> None:
        """Forgets all canvases but these, int [k]."""
        self.changes.append(Kept(lines))
        self.layers = [(keys[lines], values[lines]) for keys, values in self.layers]

    def join(self, others: CanvasKeys, own: int, more: int) -> None:
        """Appends the canvases of another batch. own, more: how many each has; those that no pass
        has computed yet get zeros."""
        self.changes.append(Joined(others, own, more))
        firsts = self.layers or _zeros(others.layers, own)
        seconds = others.layers or _zeros(self.layers, more)
        self.layers = [
            (mx.concatenate([one[0], two[0]]), mx.concatenate([one[1], two[1]]))
            for one, two in zip(firsts, seconds, strict=True)
        ]


class Held(NamedTuple):
    """Where a pass keeps its canvases' keys, and the positions that it computes; None is all."""

    keys: CanvasKeys
    subset: Subset | None


def _zeros(like: list[Pair], canvases: int) -> list[Pair]:
    return [
        (
            mx.zeros((canvases, *keys.shape[1:]), keys.dtype),
            mx.zeros((canvases, *values.shape[1:]), values.dtype),
        )
        for keys, values in like
    ]
