"""The signal by which a step learns the distributions of the step before: soft embeddings.

Summed over the tokens that carry the probability where these are nearly all of it at every
position (sparse), over the whole vocabulary otherwise (dense).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_dgemma.decoding.canvas import PinArrays
from mlx_dgemma.decoding.prediction import Prediction
from mlx_dgemma.kernels.soft_embeddings import (
    DROPPED_MASS,
    Survivors,
    gather_soft_embeddings,
    scale_embeddings,
)

if TYPE_CHECKING:
    from mlx_dgemma.model import Model


def gathered(model: Model, survivors: Survivors, kept: int) -> mx.array:
    """Soft embeddings [rows, H] of survivors that are at most `kept` per row."""
    return gather_soft_embeddings(
        survivors, model.embedding_matrix, width=width_for(kept), scale=model.embed_scale
    )


def width_for(kept: int) -> int:
    """Survivors to sum per row: a power of two, so that few different shapes are compiled."""
    return 1 << max(kept - 1, 0).bit_length()


def signal(
    model: Model,
    seen: Prediction,
    pins: PinArrays | None,
    survivors: Survivors | None,
    *,
    dropped: float,
    kept: int,
) -> mx.array:
    """The next step's self-conditioning [b, C, H]; a pinned position's is its own embedding.

    survivors: the tokens that carry the probability, at most `kept` per position, with at most
        `dropped` of it outside them; None, or too much dropped, sums over all tokens.
    """
    if survivors is None or dropped >= DROPPED_MASS:
        soft = seen.logits.signal(seen.stats, seen.temperature)
    else:
        soft = gathered(model, survivors, kept).reshape(*seen.draft.shape, -1)
    if seen.mixture is not None:
        soft = seen.mixture.signal(model, soft)
    if pins is None:
        return soft
    ids, pinned = pins
    certain = scale_embeddings(model.embedding_rows(ids).astype(soft.dtype), model.embed_scale)
    return mx.where(pinned[..., None], certain, soft)
