"""What one decoder pass said about every position of a batch of canvases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas_constraint import Mixture
from mlx_dgemma.decoding.logits import Logits
from mlx_dgemma.kernels.row_statistics import RowStatistics

if TYPE_CHECKING:
    from mlx_dgemma.model import Model


@dataclass(frozen=True)
class Prediction:
    """A decoder pass over b canvases at a temperature, pins and allowed ids respected.

    logits: raw. stats: of their rows [b * C], before pins and allowed ids. temperature: one
        number, or float32 [b * C]. draft, sample: int32 [b, C]. entropy: float32 [b, C], nats.
    certainty: float32 [C] of the rows with a constraint, the probability of their sample under it.
    mixture: their marginals, where these are not the network's own.
    """

    model: Model
    logits: Logits
    stats: RowStatistics
    temperature: float | mx.array
    draft: mx.array
    sample: mx.array
    entropy: mx.array
    certainty: Mapping[int, np.ndarray] = field(default_factory=dict)
    mixture: Mixture | None = None

    def sample_probability(self) -> mx.array:
        """float32 [b, C]: the tempered probability of each position's sample."""
        capped = self.model.softcap(self.logits.at(self.sample))
        shape = capped.shape
        divisor = self.temperature
        if isinstance(divisor, mx.array):
            divisor = divisor.reshape(shape)
        plain = mx.exp(capped / divisor - self.stats.log_z.reshape(shape))
        for line, certainty in self.certainty.items():
            own = mx.array(certainty)
            plain[line] = mx.where(mx.isnan(own), plain[line], own)
        return plain

    def logprobs(self, line: int) -> np.ndarray:
        """float32 [C]: log-probability of the draft under the untempered, softcapped logits."""
        capped = self.model.softcap(self.logits.at(self.draft)[line])
        return np.array(capped - self.logits.log_z(line))
