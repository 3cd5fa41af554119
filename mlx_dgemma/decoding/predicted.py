"""What one decoder pass said about every position of a batch of canvases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas import PinArrays
from mlx_dgemma.decoding.canvas_constraint import Mixture
from mlx_dgemma.decoding.logits import Logits
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels.row_statistics import RowStatistics
from mlx_dgemma.model.canvas_subset import Subset
from mlx_dgemma.model.scores import Scores, scores

if TYPE_CHECKING:
    from mlx_dgemma.model import Model


@dataclass(frozen=True)
class Prediction:
    """A decoder pass over b canvases at a temperature, pins and allowed ids respected.

    hidden: [b * C, H]. subset: what this pass computed; None is all, and what it did not compute is
        as it was last computed.
    free: int64 [R], the positions of the b * C that are predicted: of the computed ones, what is
        not pinned. logits: raw, of the R free rows. stats: of those rows, before allowed ids.
        temperature: one number, or float32 [R].
    draft, sample: int32 [b, C]. entropy: float32 [b, C], nats, 0 where pinned.
    certainty: float32 [C] of the rows with a constraint, the probability of their sample under it.
    mixture: their marginals, where these are not the network's own.
    """

    model: Model
    hidden: mx.array
    subset: Subset | None
    free: np.ndarray
    pins: PinArrays | None
    logits: Logits
    stats: RowStatistics
    temperature: float | mx.array
    draft: mx.array
    sample: mx.array
    entropy: mx.array
    settings: DecodingSettings
    banned: np.ndarray
    certainty: Mapping[int, np.ndarray] = field(default_factory=dict)
    mixture: Mixture | None = None

    @property
    def computed(self) -> np.ndarray:
        """bool [b, C]: the positions that this pass computed."""
        shape = self.draft.shape
        return np.ones(shape, dtype=bool) if self.subset is None else self.subset.whole

    def sample_probability(self) -> mx.array:
        """float32 [b, C]: the tempered probability of each position's sample; 1 where pinned."""
        sample = self.sample.reshape(-1)
        if self.free.size < sample.size:
            sample = sample[mx.array(self.free)]
        capped = self.model.softcap(self.logits.at(sample))
        found = mx.exp(capped / self.temperature - self.stats.log_z)
        plain = placed(found, self.free, self.pins, mx.ones(self.draft.shape))
        for line, certainty in self.certainty.items():
            own = mx.array(certainty)
            plain[line] = mx.where(mx.isnan(own), plain[line], own)
        return plain

    def scores(self, line: int, top: int) -> Scores:
        """A row's draft under the untempered logits, with `top` alternatives at every position."""
        length = self.draft.shape[1]
        hidden = self.hidden[line * length : (line + 1) * length]
        return scores(self.model, hidden, self.draft[line], top, self.banned)


def placed(
    values: mx.array, free: np.ndarray, pins: PinArrays | None, others: mx.array
) -> mx.array:
    """[b, C]: the values [R] of the free rows; elsewhere, and where a position is pinned, those of
    `others`."""
    if pins is None and free.size == others.size:
        return values.reshape(others.shape)
    flat = others.reshape(-1)
    flat[mx.array(free)] = values
    found = flat.reshape(others.shape)
    return found if pins is None else mx.where(pins[1], others, found)
