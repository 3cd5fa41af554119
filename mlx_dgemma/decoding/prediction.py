"""One decoder pass over a batch, and what decoding reads from its distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.constrained import constrain
from mlx_dgemma.decoding.logits import make_logits
from mlx_dgemma.decoding.predicted import Prediction, placed
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels.row_statistics import row_statistics
from mlx_dgemma.model.canvas_subset import Subset

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
    active, begun = state.active, state.begun
    held = state.held if begun is None else begun.held
    hidden = model.hidden(
        state.canvas, cache, state.signal, held=held, begun=begun, dispatch=dispatch
    )
    subset = None if held is None else held.subset
    free, source = free_positions(state), None
    if subset is not None:
        free, source = _free_of(subset, free)
    elif free.size < state.pinned.size:
        source = free
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = rows if source is None else rows[mx.array(source)]
    temperature = state.temperature(settings)
    if settings.temp == 0:
        uniforms = mx.zeros((batch * length, 2))
    else:
        sources = zip(state.requests, state.places, strict=True)
        uniforms = mx.stack([request.draws.sample(place, length) for request, place in sources])
        uniforms = uniforms.reshape(-1, 2)
    draws = uniforms.reshape(batch, length, 2)
    if free.size < state.pinned.size:
        chosen = mx.array(free)
        uniforms = uniforms[chosen]
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
            row = int(np.searchsorted(free, line * length + position))
            if row == free.size or free[row] != line * length + position:
                continue
            choice = mx.array(options)
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
    before = _before(state, subset)
    if subset is not None:
        assert active is not None
        assert active.kept is not None
        hidden = subset.lay_over(active.kept.hidden, hidden)
    seen = Prediction(
        model=model,
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        subset=subset,
        free=free,
        pins=state.pins,
        logits=logits,
        stats=stats,
        temperature=temperature,
        draft=placed(draft, free, state.pins, before.draft),
        sample=placed(sample, free, state.pins, before.sample),
        entropy=placed(entropy, free, state.pins, before.entropy),
        settings=settings,
        banned=forbidden,
    )
    return constrain(seen, state, draws, settings.temp)


def free_positions(state: CanvasState) -> np.ndarray:
    """int64 [R], of [b * C]: what is predicted, where pins replace the prediction: all beside a
    constraint, which reads whole canvases, and one where all is pinned."""
    if any(request.held for request in state.requests):
        return np.arange(state.pinned.size)
    free = np.flatnonzero(~state.pinned)
    return free if free.size else np.zeros(1, dtype=np.int64)


def _free_of(subset: Subset, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The free positions among those of the subset, int64 [R] of [b * C], and their rows among the
    computed ones, of [b * S]; a pinned one where there is none."""
    mine = np.isin(subset.places, free)
    if not mine.any():
        mine[0] = True
    return subset.places[mine], subset.sources[mine]


class _Before(NamedTuple):
    """What stands where nothing is predicted: draft and sample int32, entropy float32 [b, C]."""

    draft: mx.array
    sample: mx.array
    entropy: mx.array


def _before(state: CanvasState, subset: Subset | None) -> _Before:
    """The values of the steps before, and a pinned position's id, of which the network is sure."""
    nothing = mx.zeros(state.canvas.shape)
    ids = nothing.astype(mx.int32) if state.pins is None else state.pins[0]
    if subset is None:
        return _Before(ids, ids, nothing)
    assert state.active is not None
    assert state.active.kept is not None
    kept = state.active.kept
    before = _Before(state.draft, kept.sample, kept.entropy)
    if state.pins is None:
        return before
    pinned = state.pins[1]
    both = zip(before, (ids, ids, nothing), strict=True)
    return _Before(*(mx.where(pinned, known, last) for last, known in both))
