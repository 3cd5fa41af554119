"""One decoder pass over a batch, and what decoding reads from its distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.constrained import constrain
from mlx_dgemma.decoding.logits import make_logits
from mlx_dgemma.decoding.predicted import Prediction, placed
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels.row_statistics import row_statistics

if TYPE_CHECKING:
    from mlx_dgemma.model import ContextCache, Model


def predict(
    model: Model,
    cache: ContextCache,
    settings: DecodingSettings,
    state: CanvasState,
    banned: Sequence[int] = (),
    *,
    dispatch: bool = True,
) -> Prediction:
    """Runs the decoder over the canvases of `state`; reads the context, never writes it.

    banned: ids that no position can take; their logits are discarded. dispatch: see Model.hidden.
    """
    batch, length = state.canvas.shape
    free = free_positions(state)
    whole = free.size == state.pinned.size
    hidden = model.hidden(state.canvas, cache, state.signal, begun=state.begun, dispatch=dispatch)
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
        draft=placed(draft, free, state.pins, ids),
        sample=placed(sample, free, state.pins, ids),
        entropy=placed(entropy, free, state.pins, nothing),
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
