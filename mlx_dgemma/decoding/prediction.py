"""One decoder pass over a batch, and what decoding reads from its distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas import PinArrays
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
        plain = _placed(found, self.free, self.pins, mx.ones(self.draft.shape))
        for line, certainty in self.certainty.items():
            own = mx.array(certainty)
            plain[line] = mx.where(mx.isnan(own), plain[line], own)
        return plain

    def logprobs(self, line: int) -> np.ndarray:
        """float32 [C]: log-probability of the draft under the untempered, softcapped logits."""
        length = self.draft.shape[1]
        hidden = self.hidden[line * length : (line + 1) * length]
        logits = make_logits(self.model, hidden, self.banned, self.settings)
        return np.array(self.model.softcap(logits.at(self.draft[line])) - logits.log_z())


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
    free = free_positions(state)
    whole = free.size == state.pinned.size
    hidden = model.hidden(state.canvas, cache, state.signal, dispatch_every=dispatch_every)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    temperature = state.temperature(settings)
    if settings.temp == 0:
        uniforms = mx.zeros((batch * length, 2))
    else:
        sources = zip(state.requests, state.places, strict=True)
        uniforms = mx.stack([request.draws.sample(place, length) for request, place in sources])
        uniforms = uniforms.reshape(-1, 2)
    draws, rows = uniforms.reshape(batch, length, 2), hidden
    if not whole:
        chosen = mx.array(free)
        rows, uniforms = hidden[chosen], uniforms[chosen]
        if isinstance(temperature, mx.array):
            temperature = temperature[chosen]
    forbidden = np.array(banned, dtype=np.int32)
    logits = make_logits(model, rows, forbidden, settings)
    stats = logits.statistics(temperature, uniforms, settings.temp)
    draft, sample, entropy = (
        values.reshape(-1) for values in (stats.argmax, stats.sample, stats.entropy)
    )
    for line, request in enumerate(state.requests):
        for position, options in request.allowed.items():
            if state.pinned[line, position]:
                continue
            row, choice = int(np.searchsorted(free, line * length + position)), mx.array(options)
            best = row_statistics(
                logits.row(row, choice)[None],
                temperature if isinstance(temperature, float) else temperature[row],
                uniforms[row][None],
                softcap=model.config.text.final_logit_softcapping,
                temp=settings.temp,
            )
            draft[row] = choice[best.argmax[0]]
            sample[row] = choice[best.sample[0]]
            entropy[row] = best.entropy[0]
    nothing = mx.zeros((batch, length))
    ids = nothing.astype(mx.int32) if state.pins is None else state.pins[0]
    seen = Prediction(
        model=model,
        hidden=hidden,
        free=free,
        pins=state.pins,
        logits=logits,
        stats=stats,
        temperature=temperature,
        draft=_placed(draft, free, state.pins, ids),
        sample=_placed(sample, free, state.pins, ids),
        entropy=_placed(entropy, free, state.pins, nothing),
        settings=settings,
        banned=forbidden,
    )
    return constrain(seen, state, draws, settings.temp)


def free_positions(state: CanvasState) -> np.ndarray:
    """int64 [R], of [b * C]: what is predicted, where pins replace the prediction: all beside a
    constraint, which reads whole canvases, and one where all is pinned."""
    if any(request.constraint is not None for request in state.requests):
        return np.arange(state.pinned.size)
    free = np.flatnonzero(~state.pinned)
    return free if free.size else np.zeros(1, dtype=np.int64)


def _placed(
    values: mx.array, free: np.ndarray, pins: PinArrays | None, at_pins: mx.array
) -> mx.array:
    """[b, C]: the values [R] of the free rows; where a position is pinned, those of `at_pins`."""
    if pins is None:
        return values.reshape(at_pins.shape)
    flat = at_pins.reshape(-1)
    flat[mx.array(free)] = values
    return mx.where(pins[1], at_pins, flat.reshape(at_pins.shape))
