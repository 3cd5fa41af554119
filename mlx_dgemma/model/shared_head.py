"""The output head of a model that several processes hold: each computes the logits of its ids.

What a row needs of the others' logits is small: a few numbers per slice of the vocabulary, the
likely ids, and the sum of the soft embeddings. Slices are those of the row statistics, so entropy,
argmax and sample are a single process's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.kernels.row_statistics import (
    SLICE,
    RowStatistics,
    SliceStatistics,
    merge_slices,
    slice_statistics,
    tempering,
)
from mlx_dgemma.kernels.soft_embeddings import scale_embeddings, unscaled_soft_embeddings
from mlx_dgemma.model.share import Share

if TYPE_CHECKING:
    from mlx_dgemma.model.network import Model

# The raw logit of a banned id: the softcap makes it -softcap, which leaves next to no probability
# and, unlike -Inf, no NaN from 0 * log 0.
OUT_OF_REACH = -1e4
GROUPS = 256  # of ids, by remainder, when the likely ones are looked for


class SharedHead:
    """This rank's logits of R rows. Every method is a collective: all ranks call it, and where a
    value is not theirs the others give an array of its shape."""

    def __init__(self, model: Model, hidden: mx.array, banned: np.ndarray) -> None:
        """hidden: rank 0's [R, H]. banned: ids whose logits are discarded."""
        team = model.team
        assert team is not None
        self._team = team
        text = model.config.text
        self._softcap, self._scale = text.final_logit_softcapping, model.embed_scale
        shares = [Share(rank, team.size) for rank in range(team.size)]
        self._runs = [share.vocabulary(text) for share in shares]
        self.hidden = team.share(hidden)
        self._first, last = self._runs[team.rank]
        table = model.embedding_matrix
        self._table = table.rows(self._first, last) if team.rank == 0 else table
        self._raw = None
        if last > self._first:
            self._raw = self._table.apply(self.hidden, transpose=True)
            own = np.sort(banned[(banned >= self._first) & (banned < last)]) - self._first
            if own.size:
                self._raw[..., mx.array(own)] = OUT_OF_REACH
        mx.async_eval(self.hidden if self._raw is None else self._raw)

    @property
    def rows(self) -> int:
        return int(self.hidden.shape[0])

    def statistics(self, drawn: mx.array, temp: float) -> tuple[RowStatistics, mx.array]:
        """Statistics of every row, and its temperature [R], the same on all ranks.

        drawn: rank 0's float32 [R, 3], the two uniforms and the schedule's temperature.
        """
        drawn = self._team.share(drawn)
        first, second, divisor = drawn[:, 0], drawn[:, 1], tempering(drawn[:, 2], self.rows)
        own: list[mx.array] = []
        for start in range(0, 0 if self._raw is None else self._raw.shape[1], SLICE):
            assert self._raw is not None
            raw = self._raw[:, start : start + SLICE]
            if own:
                raw = mx.depends([raw], own[-1:])[0]
            part, _ = slice_statistics(
                raw, divisor, second, self._first + start, self._softcap, temp
            )
            own.append(mx.stack([field.astype(mx.float32) for field in part]))
        counts = [-(-(last - first) // SLICE) for first, last in self._runs]
        nothing = mx.zeros((len(SliceStatistics._fields), self.rows))
        own += [nothing] * (max(counts) - len(own))
        found = self._team.gather(mx.stack(own))
        parts = [
            _slice(found[rank, index])
            for rank, count in enumerate(counts)
            for index in range(count)
        ]
        stats = merge_slices(parts, first, temp)
        mx.async_eval(*stats, drawn)
        return stats, drawn[:, 2]

    def signal(self, temperature: mx.array, log_z: mx.array, some: np.ndarray | None) -> mx.array:
        """Soft embeddings [r, H] of the rows `some`, or of all, at `statistics`' results."""
        raw = self._raw
        if some is not None:
            chosen = mx.array(some)
            temperature, log_z = temperature[chosen], log_z[chosen]
            raw = None if raw is None else raw[chosen]
        if raw is None:
            own = mx.zeros((log_z.shape[0], self.hidden.shape[1] + 1))
        else:
            held = raw
            summed, total = unscaled_soft_embeddings(
                lambda start, stop: held[:, start:stop],
                log_z,
                temperature,
                self._table,
                softcap=self._softcap,
            )
            own = mx.concatenate([summed, total], axis=1)
        (both,) = self._team.sum(own)
        soft = scale_embeddings(
            (both[:, :-1] / both[:, -1:]).astype(self._table.dtype), self._scale
        )
        mx.async_eval(soft)
        return soft

    def candidates(self, rows: slice) -> tuple[mx.array, mx.array]:
        """The best id of each residue int32 [r, GROUPS] among some rows' logits, and its logit."""
        count = rows.stop - rows.start
        ids = mx.zeros((count, GROUPS), mx.int32)
        best = mx.full((count, GROUPS), -mx.inf)
        if self._raw is not None:
            ids, best = best_of_groups(self._raw[rows], self._first)
        found = self._team.gather(mx.stack([ids.astype(mx.float32), best.astype(mx.float32)]))
        where = found[:, 1].argmax(axis=0, keepdims=True)
        ids, best = (mx.take_along_axis(found[:, n], where, axis=0)[0] for n in (0, 1))
        ids = ids.astype(mx.int32)
        mx.async_eval(ids, best)
        return ids, best


def best_of_groups(raw: mx.array, start: int) -> tuple[mx.array, mx.array]:
    """Of raw logits [C, n] of the ids from `start` (a multiple of GROUPS) on: the best id of each
    residue int32 [C, GROUPS], and its logit; -Inf where n is smaller than GROUPS."""
    if short := -raw.shape[1] % GROUPS:
        raw = mx.pad(raw, [(0, 0), (0, short)], constant_values=-mx.inf)
    grouped = raw.reshape(raw.shape[0], -1, GROUPS)
    best = grouped.argmax(axis=1, keepdims=True)
    ids = start + best[:, 0].astype(mx.int32) * GROUPS + mx.arange(GROUPS, dtype=mx.int32)
    return ids, mx.take_along_axis(grouped, best, axis=1)[:, 0]


def _slice(numbers: mx.array) -> SliceStatistics:
    """One slice's statistics of float32 [6, R]; ids are exact, as they are below 2**24."""
    fields = dict(zip(SliceStatistics._fields, numbers, strict=True))
    fields["argmax"] = fields["argmax"].astype(mx.int32)
    fields["candidate"] = fields["candidate"].astype(mx.int32)
    return SliceStatistics(**fields)
