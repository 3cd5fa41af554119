"""What the host reads of a denoising step: one vector, packed on the device and read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.sampler import Decision
from mlx_dgemma.kernels.sparse_embeddings import Survivors


class Numbers(NamedTuple):
    """A report on the host, of b canvases of C positions.

    repeated bool [b]: the draft equals the previous one. mean_entropy float32 [b], nats.
    finite bool [b]: every entropy is finite. complete bool [b]: the sampler finished the row.
    entropy: float32 [b * C], nats. marks: int64 [b * C], see active_positions; none without them.
    dropped: float32 [R], the probability that a free position's survivors leave out; counts: int64
    [R], how many survivors it has. All of it and none where none were selected.
    """

    repeated: np.ndarray
    mean_entropy: np.ndarray
    finite: np.ndarray
    complete: np.ndarray
    entropy: np.ndarray
    marks: np.ndarray
    dropped: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Report:
    """packed: float32, the columns of every canvas, the entropies of all positions, their marks
    where they have some, and of the free positions whose survivors were selected what these dropped
    and how many they are."""

    packed: mx.array
    canvases: int
    positions: int
    marked: int
    selected: int

    @classmethod
    def pack(
        cls,
        decision: Decision,
        entropy: mx.array,
        survivors: Survivors | None,
        marks: mx.array | None = None,
    ) -> Report:
        """entropy, marks: float32 [b, C]."""
        status = decision.status
        if decision.complete is not None:
            complete = decision.complete[:, None].astype(mx.float32)
            status = mx.concatenate([status, complete], axis=1)
        parts = [status.reshape(-1), entropy.reshape(-1)]
        if marks is not None:
            parts.append(marks.reshape(-1))
        if survivors is not None:
            parts += [survivors.dropped, survivors.counts.astype(mx.float32)]
        selected = 0 if survivors is None else survivors.counts.size
        marked = 0 if marks is None else marks.size
        return cls(mx.concatenate(parts), status.shape[0], entropy.size, marked, selected)

    def read(self) -> Numbers:
        """Waits for the device; the one host read of a step."""
        packed = np.array(self.packed)
        sizes = [self.positions, self.marked, self.selected, self.selected]
        starts = packed.size - sum(sizes) + np.cumsum([0, *sizes[:-1]])
        status, entropy, marks, dropped, counts = np.split(packed, starts)
        columns = status.reshape(self.canvases, -1).T
        complete = columns[3] > 0 if len(columns) > 3 else np.zeros(self.canvases, dtype=bool)
        if not self.selected:
            dropped, counts = np.ones(self.positions), np.zeros(self.positions)
        return Numbers(
            columns[0] > 0,
            columns[1],
            columns[2] > 0,
            complete,
            entropy,
            marks.astype(np.int64),
            dropped,
            counts.astype(np.int64),
        )
