"""The signal by which a step learns the distributions of the step before: soft embeddings.

Each position for itself: summed over the tokens that carry its probability where these are nearly
all of it (sparse), over the whole vocabulary otherwise (dense), and for a pinned position neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.predicted import Prediction
from mlx_dgemma.decoding.report import Numbers
from mlx_dgemma.kernels.soft_embeddings import scale_embeddings
from mlx_dgemma.kernels.sparse_embeddings import (
    DROPPED_MASS,
    Survivors,
    gather_soft_embeddings,
    most_entropy,
)

if TYPE_CHECKING:
    from mlx_dgemma.decoding.canvas_state import CanvasState
    from mlx_dgemma.model import Model


def may_be_sparse(state: CanvasState, vocabulary: int) -> bool:
    """Whether a position of the next step may be summed sparsely, from the entropies of the step
    before: where the surest position was all but uniform, none will be this time."""
    return state.least_entropy <= most_entropy(vocabulary)


def signal(
    model: Model,
    seen: Prediction,
    state: CanvasState,
    survivors: Survivors | None,
    numbers: Numbers,
) -> mx.array:
    """The next step's self-conditioning [b, C, H]; a pinned position's is its own embedding.

    state: as it was for this step. survivors: the tokens that carry the probability, or None.
    """
    sparse = numbers.dropped < DROPPED_MASS
    dense = np.flatnonzero(~sparse)
    if survivors is None or not sparse.any():
        soft = seen.logits.signal(seen.stats, seen.temperature)
    else:
        counts = np.where(sparse, numbers.counts, 0)
        soft = gather_soft_embeddings(
            survivors, model.embedding_matrix, counts, scale=model.embed_scale
        )
        if dense.size:
            soft[mx.array(dense)] = seen.logits.signal(seen.stats, seen.temperature, dense)
    if seen.mixture is not None:
        whole = seen.mixture.signal(model, soft.reshape(*seen.draft.shape, -1))
        soft = whole.reshape(soft.shape)
    if state.pins is None and seen.subset is None:
        return soft.reshape(*seen.draft.shape, -1)
    certain = None
    if state.pins is not None:
        ids, pinned = state.pins
        certain = scale_embeddings(model.embedding_rows(ids).astype(soft.dtype), model.embed_scale)
    others = certain if seen.subset is None else state.signal  # what was not computed keeps its own
    assert others is not None
    flat = others.reshape(-1, others.shape[-1])
    flat[mx.array(seen.free)] = soft
    found = flat.reshape(others.shape)
    return found if certain is None else mx.where(pinned[..., None], certain, found)
