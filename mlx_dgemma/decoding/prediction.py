"""One decoder pass over a batch, and what decoding reads from its distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.constrained import Mixture, constrain
from mlx_dgemma.decoding.logits import Logits, make_logits
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels.row_statistics import RowStatistics, row_statistics
from mlx_dgemma.model.network import DISPATCH_EVERY

if TYPE_CHECKING:
    from mlx_dgemma.model import ContextCache, Model


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


def predict(
    model: Model,
    cache: ContextCache,
    settings: DecodingSettings,
    state: CanvasState,
    banned: Sequence[int] = (),
    *,
    dispatch_every: int | None = DISPATCH_EVERY,
) -> Prediction:
    """Runs the decoder over the canvases of `state`; reads the context, never writes it.

    banned: ids that no position can take; their logits are discarded. dispatch_every: see
        Model.hidden.
    """
    batch, length = state.canvas.shape
    temperature = state.temperature(settings)
    hidden = model.hidden(state.canvas, cache, state.signal, dispatch_every=dispatch_every)
    logits = make_logits(model, hidden, np.array(banned, dtype=np.int32), settings)
    if settings.temp == 0:
        uniforms = mx.zeros((batch, length, 2))
    else:
        sources = zip(state.requests, state.places, strict=True)
        uniforms = mx.stack([request.draws.sample(place, length) for request, place in sources])
    stats = logits.statistics(temperature, uniforms.reshape(-1, 2), settings.temp)
    entropy = stats.entropy.reshape(batch, length)
    draft, sample = stats.argmax.reshape(batch, length), stats.sample.reshape(batch, length)
    for line, request in enumerate(state.requests):
        for position, options in request.allowed.items():
            choice = mx.array(options)
            best = row_statistics(
                logits.row(line, position, choice)[None],
                temperature if isinstance(temperature, float) else temperature[line * length],
                uniforms[line, position][None],
                softcap=model.config.text.final_logit_softcapping,
                temp=settings.temp,
            )
            draft[line, position] = choice[best.argmax[0]]
            sample[line, position] = choice[best.sample[0]]
            entropy[line, position] = best.entropy[0]
    if state.pins is not None:
        ids, pinned = state.pins
        draft, sample = mx.where(pinned, ids, draft), mx.where(pinned, ids, sample)
        entropy = mx.where(pinned, 0.0, entropy)
    seen = Prediction(model, logits, stats, temperature, draft, sample, entropy)
    return constrain(seen, state, uniforms, settings.temp)
