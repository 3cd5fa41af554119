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

import itertools
import weakref
from typing import TYPE_CHECKING, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from mlx_dgemma.distributed.team import Leader
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.kernels.row_statistics import (
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
from mlx_dgemma.model.shared_head import OUT_OF_REACH, SharedHead, best_of_groups

T = TypeVar("T", mx.array, float | mx.array)

if TYPE_CHECKING:
    from mlx_dgemma.decoding.settings import DecodingSettings
    from mlx_dgemma.model import Model

_ROWS = 64  # that `ExponentialLogits` takes at a time, beside all that it keeps


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
    if isinstance(model.team, Leader):
        return SharedLogits(model, hidden, banned, model.team)
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
            self._raw[..., mx.array(banned)] = OUT_OF_REACH

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
        return best_of_groups(self._raw[rows], 0)


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
            some = best_of_groups(self._slice(hidden, start, stop), start)
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
            raw[:, mx.array(self._banned[first:last] - start)] = OUT_OF_REACH
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
        return [slice(first, first + _ROWS) for first in range(0, rows, _ROWS)]


_numbers = itertools.count()


class SharedLogits(SlicedLogits):
    """The logits of several processes, each of which holds those of its part of the vocabulary.

    Single ids' logits are made again, from the table that rank 0 holds.
    """

    def __init__(self, model: Model, hidden: mx.array, banned: np.ndarray, team: Leader) -> None:
        super().__init__(model, hidden, banned)
        self._team, self._number = team, next(_numbers)
        dtype = str(hidden.dtype).split(".")[-1]
        shape, ids = list(hidden.shape), banned.tolist()
        team.tell(
            "logits",
            number=self._number,
            model=model.number,
            shape=shape,
            dtype=dtype,
            banned=ids,
        )
        self._head = SharedHead(model, hidden, banned)
        weakref.finalize(self, team.later, "forget_logits", number=self._number)

    def statistics(
        self, temperature: float | mx.array, uniforms: mx.array, temp: float
    ) -> RowStatistics:
        self._team.tell("statistics", number=self._number, temp=temp, kept=True)
        return self._ask(temperature, uniforms, temp)

    def signal(
        self,
        stats: RowStatistics,
        temperature: float | mx.array,
        some: np.ndarray | None = None,
    ) -> mx.array:
        rows = None if some is None else some.tolist()
        self._team.tell("signal", number=self._number, some=rows)
        each = mx.broadcast_to(mx.array(temperature), (self._head.rows,))
        return self._head.signal(each, stats.log_z, some)

    def candidates(self, rows: slice) -> tuple[mx.array, mx.array]:
        self._team.tell("candidates", number=self._number, rows=[rows.start, rows.stop])
        return self._head.candidates(rows)

    def log_z(self) -> mx.array:
        self._team.tell("statistics", number=self._number, temp=0.0, kept=False)
        return self._ask(1.0, mx.zeros((self._head.rows, 2)), 0.0).log_z

    def _ask(self, temperature: float | mx.array, uniforms: mx.array, temp: float) -> RowStatistics:
        each = mx.broadcast_to(mx.array(temperature, dtype=mx.float32), (self._head.rows,))
        drawn = mx.concatenate([uniforms, each[:, None]], axis=1)
        return self._head.statistics(drawn, temp)[0]


def _rows_of(values: T, some: np.ndarray | None) -> T:
    """Rows of an array; a number is every row's."""
    return values if some is None or not isinstance(values, mx.array) else values[mx.array(some)]
