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
from mlx_dgemma.model.scores import Scores, scores

if TYPE_CHECKING:
    from mlx_dgemma.model import Model


@dataclass(frozen=True)
class Prediction:
    """A decoder pass over b canvases at a temperature, pins and allowed ids respected.

    hidden: [b * C, H]. free: int64 [R], the positions among them that are not pinned; of the others
        nothing is predicted. logits: raw, of the R free rows. stats: of those rows, before allowed
        ids. temperature: one number, or float32 [R]. draft, sample: int32 [b, C]. entropy: float32
        [b, C], nats, 0 where pinned.
    certainty: float32 [C] of the rows with a constraint, the probability of their sample under it.
    mixture: their marginals, where these are not the network's own.
    """

    model: Model
    hidden: mx.array
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
    values: mx.array, free: np.ndarray, pins: PinArrays | None, at_pins: mx.array
) -> mx.array:
    """[b, C]: the values [R] of the free rows; where a position is pinned, those of `at_pins`."""
    if pins is None:
        return values.reshape(at_pins.shape)
    flat = at_pins.reshape(-1)
    flat[mx.array(free)] = values
    return mx.where(pins[1], at_pins, flat.reshape(at_pins.shape))
