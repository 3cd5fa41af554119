"""What a row of a batch ends with: its draft, and how sure the network was of it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.predicted import Prediction
from mlx_dgemma.model.scores import Scores


@dataclass(frozen=True)
class BlockResult:
    """A row's finished block.

    ids: int32 [C], the last draft (not the noisy canvas).
    entropy: float32 [C], nats, of the last step's tempered distributions; 0 where pinned.
    settled: int32 [C], the step (1 is the block's first) that last changed the draft there.
    scores: of `ids` and of their alternatives, when asked for.
    steps: denoising steps taken. converged: whether the stop test fired.
    computed: canvas positions that each of those steps computed, C where all were.
    fell_back: whether a block of which not all was computed ended as the reference ends it, because
        its check did not agree or half of the steps were taken.
    """

    ids: np.ndarray
    entropy: np.ndarray
    settled: np.ndarray
    scores: Scores | None
    steps: int
    converged: bool
    computed: tuple[int, ...] = ()
    fell_back: bool = False

    @classmethod
    def untouched(cls, ids: np.ndarray, alternatives: int | None) -> BlockResult:
        """A draft int32 [C] kept at strength 0: nothing was predicted, so nothing is known."""
        unknown = np.full(ids.shape, np.nan, dtype=np.float32)
        scored = None
        if alternatives is not None:
            shape = (len(ids), alternatives)
            scored = Scores(
                unknown, np.zeros(shape, dtype=np.int32), np.full(shape, np.nan, dtype=np.float32)
            )
        return cls(ids, unknown, np.zeros_like(ids), scored, 0, True)


def finished(
    state: CanvasState,
    ended: np.ndarray,
    converged: np.ndarray,
    seen: Prediction,
    settled: mx.array,
    *,
    alternatives: int | None,
) -> dict[int, BlockResult]:
    """Row -> result of the rows that `ended` (bool [b]) with this step.

    converged: bool [b]. seen, settled: the step's prediction, and `settled_after` it.
    alternatives: as in `denoise_block`.
    """
    if not ended.any():
        return {}
    ids, entropy, steps = np.array(seen.draft), np.array(seen.entropy), np.array(settled)
    return {
        state.rows[line]: BlockResult(
            ids=ids[line],
            entropy=entropy[line],
            settled=steps[line],
            scores=None if alternatives is None else seen.scores(line, alternatives),
            steps=int(state.taken[line]) + 1,
            converged=bool(converged[line]),
            computed=(*state.computed[line], int(seen.computed[line].sum())),
            fell_back=state.active is not None and bool(state.active.fallen[line]),
        )
        for line in np.flatnonzero(ended).tolist()
    }


def untouched(state: CanvasState, *, alternatives: int | None) -> dict[int, BlockResult]:
    """Row -> result of the rows that keep their draft without a step (strength 0)."""
    return {
        state.rows[line]: BlockResult.untouched(np.array(state.canvas[line]), alternatives)
        for line in np.flatnonzero(state.remaining == 0).tolist()
    }
