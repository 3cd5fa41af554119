"""From one step to the positions that the next one computes."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.active_positions import ActivePositions, Kept, Marks, pack
from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.predicted import Prediction
from mlx_dgemma.decoding.report import Numbers
from mlx_dgemma.decoding.sampler import Decision
from mlx_dgemma.decoding.settings import DecodingSettings


def outside(state: CanvasState) -> mx.array | None:
    """bool [b, C]: the positions that count for nothing; None where all count."""
    pinned = None if state.pins is None else state.pins[1]
    if state.active is None or not (tail := state.active.tail).any():
        return pinned
    return mx.array(tail) if pinned is None else mx.logical_or(pinned, mx.array(tail))


def marks(
    state: CanvasState, seen: Prediction, decision: Decision, stop_ids: Collection[int]
) -> mx.array:
    """float32 [b, C]: what the host must know of every position, see active_positions."""
    kept = mx.logical_or(decision.accepted, decision.revealed)
    if state.pins is not None:
        kept = mx.logical_or(kept, state.pins[1])
    unchanged = mx.logical_and(seen.draft == state.draft, decision.canvas == state.canvas)
    ends = mx.zeros(kept.shape, dtype=mx.bool_)
    if stop_ids:
        ends = (seen.draft[..., None] == mx.array(sorted(stop_ids))).any(axis=-1)
    return pack(kept, unchanged, ends)


def hold_back(
    state: CanvasState,
    seen: Prediction,
    numbers: Numbers,
    converged: np.ndarray,
    settings: DecodingSettings,
) -> np.ndarray:
    """bool [b]: which of the `converged` rows must go on, see ActivePositions.hold_back."""
    assert state.active is not None

    def drawn(line: int) -> bool:
        if state.last[line] or not settings.check_share:
            return False
        return state.requests[line].draws.check(state.starts[line]) < settings.check_share

    return state.active.hold_back(converged, numbers.repeated, seen.computed, drawn)


def advance(
    state: CanvasState, active: ActivePositions, seen: Prediction, numbers: Numbers
) -> None:
    """Takes in a step; `state` is as it was for it."""
    shape = state.canvas.shape
    hidden = seen.hidden.reshape(*shape, -1)
    active.kept = Kept(seen.sample, seen.entropy, hidden)
    found, entropy = Marks.unpack(numbers.marks.reshape(shape)), numbers.entropy.reshape(shape)
    active.after(found, entropy, seen.computed)
    # A block that does not end is left to the reference for the other half of its steps.
    active.fallen |= state.taken + 1 >= state.remaining - 1
