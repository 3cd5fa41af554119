"""What decoding asks of one decoder pass's logits, held whole or never held at all.

Positions are rows: those of all canvases, flattened, without the pinned ones.
`WholeLogits` keeps the raw logits [R, V] until the next step has its self-conditioning.
`SlicedLogits` keeps the hidden states alone and makes one slice of the vocabulary at a time,
once for the statistics and once for the signal: the head's work twice, a fraction of its memory.
`ExponentialLogits` makes them slice by slice too, but keeps the exponentials that the statistics
computed, which take as much memory as the logits; the signal then costs one matrix product. It is
for backends where exponentials are expensive. All give the same statistics, since those walk the
vocabulary in the same slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from mlx_dgemma.kernels import dispatch
from mlx_dgemma.kernels.row_statistics import (
    ROW_BLOCK,
    SLICE,
    Exponentials,
    RowStatistics,
    row_statistics,
    sliced_row_statistics,
)
from mlx_dgemma.kernels.soft_embeddings import (
    kept_soft_embeddings,
    sliced_soft_embeddings,
    soft_embeddings,
)
from mlx_dgemma.kernels.sparse_embeddings import Survivors, select_survivors

T = TypeVar("T", mx.array, float | mx.array)

if TYPE_CHECKING:
    from mlx_dgemma.decoding.settings import DecodingSettings
    from mlx_dgemma.model import Model

# The raw logit of a banned id: the softcap makes it -softcap, which leaves next to no probability
# and, unlike -Inf, no NaN from 0 * log 0.
_OUT_OF_REACH = -1e4
GROUPS = 256  # of ids, by remainder, when the likely ones are looked for


class Logits(Protocol):
    """The raw logits of R canvas positions."""

    def statistics(
        self, temperature: float | mx.array, uniforms: mx.array, temp: float
    ) -> RowStatistics:
        """Statistics and a sample of every row; uniforms float32 [R, 2].

        temperature: one number, or float32 [R].
        """

    def signal(
        self,
        stats: RowStatistics,
        temperature: float | mx.array,
        some: np.ndarray | None = None,
    ) -> mx.array:
        """Soft embeddings [R, H] of the tempered logits; `some`, int [r]: of these rows alone."""

    def survivors(self, stats: RowStatistics, temperature: float | mx.array) -> Survivors:
        """The tokens that carry the probability of each of the rows [b * C]."""

    def at(self, ids: mx.array) -> mx.array:
        """float32 [R]: the raw logit of one id per row, ids int32 [R]."""

    def row(self, row: int, options: mx.array) -> mx.array:
        """[n]: the raw logits of some ids in one row."""

    def columns(self, rows: slice, ids: mx.array) -> mx.array:
        """[r, n]: some rows' raw logits of some ids, the same in every row."""

    def candidates(self, rows: slice) -> tuple[mx.array, mx.array]:
        """Some rows' likely ids int32 [r, GROUPS] and their raw logits: the best of each residue
        of the id modulo GROUPS, so that neighbours in the vocabulary do not compete."""


def make_logits(
    model: Model, hidden: mx.array, banned: np.ndarray, settings: DecodingSettings
) -> Logits:
    """The way to hold the logits of hidden states [R, H] that suits settings and backend.

    banned: int ids whose logits are discarded.
    """
    if settings.sliced_head:
        return SlicedLogits(model, hidden, banned)
    dtype = model.embedding_matrix.dtype
    sparse = settings.sparse_conditioning(8 * dtype.size)
    # With float32 tables nothing is cast between the logits and the signal.
    if dtype == mx.float32 and not sparse and not dispatch.available():
        return ExponentialLogits(model, hidden, banned)
    return WholeLogits(model, hidden, banned)


class WholeLogits:
    """Raw logits as one array."""

    def __init__(self, model: Model, hidden: mx.array, banned: np.ndarray) -> None:
        self._model = model
        self._softcap = model.config.text.final_logit_softcapping
        self._raw = model.raw_logits(hidden)
        if banned.size:
            self._raw[..., mx.array(banned)] = _OUT_OF_REACH

    def statistics(
        self, temperature: float | mx.array, uniforms: mx.array, temp: float
    ) -> RowStatistics:
        return row_statistics(self._raw, temperature, uniforms, softcap=self._softcap, temp=temp)

    def signal(
        self,
        stats: RowStatistics,
        temperature: float | mx.array,
        some: np.ndarray | None = None,
    ) -> mx.array:
        return soft_embeddings(
            _rows_of(self._raw, some),
            _rows_of(stats.log_z, some),
            _rows_of(temperature, some),
            self._model.embedding_matrix,
            softcap=self._softcap,
            scale=self._model.embed_scale,
        )

    def survivors(self, stats: RowStatistics, temperature: float | mx.array) -> Survivors:
        dtype = self._model.embedding_matrix.dtype
        return select_survivors(self._raw, stats.log_z, temperature, dtype, softcap=self._softcap)

    def at(self, ids: mx.array) -> mx.array:
        return mx.take_along_axis(self._raw, ids[..., None], axis=-1)[..., 0].astype(mx.float32)

    def row(self, row: int, options: mx.array) -> mx.array:
        return self._raw[row][options]

    def columns(self, rows: slice, ids: mx.array) -> mx.array:
        return self._raw[rows][:, ids]

    def candidates(self, rows: slice) -> tuple[mx.array, mx.array]:
        return _best_of_groups(self._raw[rows], 0)


class SlicedLogits:
    """Hidden states, from which any slice of the logits can be made again."""

    def __init__(self, model: Model, hidden: mx.array, banned: np.ndarray) -> None:
        self._hidden = hidden
        self._softcap = model.config.text.final_logit_softcapping
        self._scale = model.embed_scale
        self._table = model.embedding_matrix
        self._vocabulary = model.config.text.vocab_size
        self._banned = np.sort(banned)

    def statistics(
        self, temperature: float | mx.array, uniforms: mx.array, temp: float
    ) -> RowStatistics:
        return self._statistics(self._hidden, temperature, uniforms, temp)

    def signal(
        self,
        stats: RowStatistics,
        temperature: float | mx.array,
        some: np.ndarray | None = None,
    ) -> mx.array:
        hidden = _rows_of(self._hidden, some)
        return sliced_soft_embeddings(
            lambda start, stop: self._slice(hidden, start, stop),
            _rows_of(stats.log_z, some),
            _rows_of(temperature, some),
            self._table,
            softcap=self._softcap,
            scale=self._scale,
        )

    def survivors(self, stats: RowStatistics, temperature: float | mx.array) -> Survivors:
        raise ValueError("a sliced head sums its signal densely")

    def at(self, ids: mx.array) -> mx.array:
        rows = self._table.take(ids).astype(self._hidden.dtype)
        return (self._hidden * rows).sum(axis=-1).astype(mx.float32)

    def row(self, row: int, options: mx.array) -> mx.array:
        rows = self._table.take(options).astype(self._hidden.dtype)
        return rows @ self._hidden[row]

    def columns(self, rows: slice, ids: mx.array) -> mx.array:
        taken = self._table.take(ids).astype(self._hidden.dtype)
        return self._hidden[rows] @ taken.T

    def candidates(self, rows: slice) -> tuple[mx.array, mx.array]:
        hidden, found = self._hidden[rows], None
        for start in range(0, self._vocabulary, SLICE):
            stop = min(start + SLICE, self._vocabulary)
            some = _best_of_groups(self._slice(hidden, start, stop), start)
            if found is not None:
                better = some[1] > found[1]
                some = mx.where(better, some[0], found[0]), mx.where(better, some[1], found[1])
            found = some
            mx.eval(*found)
        assert found is not None
        return found

    def _statistics(
        self,
        hidden: mx.array,
        temperature: float | mx.array,
        uniforms: mx.array,
        temp: float,
        kept: list[Exponentials] | None = None,
    ) -> RowStatistics:
        return sliced_row_statistics(
            lambda start, stop: self._slice(hidden, start, stop),
            hidden.shape[0],
            self._vocabulary,
            temperature,
            uniforms,
            softcap=self._softcap,
            temp=temp,
            kept=kept,
        )

    def _slice(self, hidden: mx.array, start: int, stop: int) -> mx.array:
        raw = self._table.rows(start, stop).apply(hidden, transpose=True)
        first, last = np.searchsorted(self._banned, (start, stop))
        if first < last:
            raw[:, mx.array(self._banned[first:last] - start)] = _OUT_OF_REACH
        return raw


class ExponentialLogits(SlicedLogits):
    """Hidden states, and the exponentials of their tempered logits, slice by slice."""

    def __init__(self, model: Model, hidden: mx.array, banned: np.ndarray) -> None:
        super().__init__(model, hidden, banned)
        self._kept: list[list[Exponentials]] = []  # by block of rows, then by slice

    def statistics(
        self, temperature: float | mx.array, uniforms: mx.array, temp: float
    ) -> RowStatistics:
        self._kept = []
        blocks: list[RowStatistics] = []
        for some in self._row_blocks():
            hidden, drawn = self._hidden[some], uniforms[some]
            t = temperature[some] if isinstance(temperature, mx.array) else temperature
            if blocks:  # one block at a time, so that temporaries stay small
                hidden, drawn = mx.depends([hidden, drawn], list(blocks[-1]))
            self._kept.append([])
            blocks.append(self._statistics(hidden, t, drawn, temp, self._kept[-1]))
        return RowStatistics(*(mx.concatenate(list(field)) for field in zip(*blocks, strict=True)))

    def signal(
        self,
        stats: RowStatistics,
        temperature: float | mx.array,
        some: np.ndarray | None = None,
    ) -> mx.array:
        soft = [
            kept_soft_embeddings(kept, stats.log_z[block], self._table, scale=self._scale)
            for kept, block in zip(self._kept, self._row_blocks(), strict=True)
        ]
        return _rows_of(mx.concatenate(soft), some)

    def _row_blocks(self) -> list[slice]:
        rows = self._hidden.shape[0]
        return [slice(first, first + ROW_BLOCK) for first in range(0, rows, ROW_BLOCK)]


def _rows_of(values: T, some: np.ndarray | None) -> T:
    """Rows of an array; a number is every row's."""
    return values if some is None or not isinstance(values, mx.array) else values[mx.array(some)]


def _best_of_groups(raw: mx.array, start: int) -> tuple[mx.array, mx.array]:
    """Of raw logits [C, n] of the ids from `start` (a multiple of GROUPS) on: the best id of each
    residue int32 [C, GROUPS], and its logit; -Inf where n is smaller than GROUPS."""
    if short := -raw.shape[1] % GROUPS:
        raw = mx.pad(raw, [(0, 0), (0, short)], constant_values=-mx.inf)
    grouped = raw.reshape(raw.shape[0], -1, GROUPS)
    best = grouped.argmax(axis=1, keepdims=True)
    ids = start + best[:, 0].astype(mx.int32) * GROUPS + mx.arange(GROUPS, dtype=mx.int32)
    return ids, mx.take_along_axis(grouped, best, axis=1)[:, 0]
