"""One decoder pass over a batch, and what decoding reads from its distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.constrained import constrain
from mlx_dgemma.decoding.logits import make_logits
from mlx_dgemma.decoding.predicted import Prediction
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels.row_statistics import row_statistics
from mlx_dgemma.model.network import DISPATCH_EVERY

if TYPE_CHECKING:
    from mlx_dgemma.model import ContextCache, Model


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
