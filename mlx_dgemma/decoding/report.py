"""What the host reads of a denoising step: one vector, packed on the device and read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas import PinArrays
from mlx_dgemma.decoding.sampler import Decision
from mlx_dgemma.kernels.soft_embeddings import Survivors


class Numbers(NamedTuple):
    """A report on the host.

    repeated bool [b]: the draft equals the previous one. mean_entropy float32 [b], nats.
    finite bool [b]: every entropy is finite. complete bool [b]: the sampler finished the row.
    dropped: the most probability that a position's survivors leave out; kept: the most survivors
    of a position. 1 and 0 where none were selected.
    """

    repeated: np.ndarray
    mean_entropy: np.ndarray
    finite: np.ndarray
    complete: np.ndarray
    dropped: float
    kept: int


@dataclass(frozen=True)
class Report:
    """packed: float32 [rows * columns + 2], every row's columns, then `dropped` and `kept`."""

    packed: mx.array
    rows: int

    @classmethod
    def pack(
        cls, decision: Decision, survivors: Survivors | None, pins: PinArrays | None
    ) -> Report:
        """A pinned position's signal is its own embedding, so its survivors do not count."""
        status = decision.status
        if decision.complete is not None:
            complete = decision.complete[:, None].astype(mx.float32)
            status = mx.concatenate([status, complete], axis=1)
        if survivors is None:
            tail = [mx.array([1.0, 0.0])]
        else:
            dropped, count = survivors.dropped, survivors.counts
            if pins is not None:
                free = mx.logical_not(pins[1].reshape(-1))
                dropped, count = dropped * free, count * free
            tail = [dropped.max()[None], count.max()[None]]
        return cls(mx.concatenate([status.reshape(-1), *tail]), status.shape[0])

    def read(self) -> Numbers:
        """Waits for the device; the one host read of a step."""
        packed = np.array(self.packed)
        columns = packed[:-2].reshape(self.rows, -1).T
        complete = columns[3] > 0 if len(columns) > 3 else np.zeros(self.rows, dtype=bool)
        dropped, kept = packed[-2:]
        return Numbers(
            columns[0] > 0, columns[1], columns[2] > 0, complete, float(dropped), int(kept)
        )
