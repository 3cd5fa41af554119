"""Who sees whom: boolean masks [queries, keys], built only where something is hidden.

The decoder pass needs none: a canvas sees itself and the whole context, and a sliding layer's
limit is a slice of the keys. The encoder pass is causal, with a window on sliding layers and
with image blocks whose members see each other.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def encoder_mask(
    first_query: int,
    queries: int,
    first_key: int,
    keys: int,
    window: int | None,
    blocks: np.ndarray | None = None,
) -> mx.array | None:
    """Mask for queries at `first_query`.. over keys at `first_key`..; None when all are visible.

    A key j is visible to query i iff i - window < j <= i, or both belong to one image block.
    blocks: int [queries], the image block of every query, -1 for text. Cached keys belong to no
        block of this chunk, because a chunk never cuts a block.
    """
    last_key = first_key + keys - 1
    hidden_by_window = window is not None and first_key <= first_query + queries - 1 - window
    if last_key <= first_query and not hidden_by_window:
        return None
    i = np.arange(first_query, first_query + queries)[:, None]
    j = np.arange(first_key, first_key + keys)[None, :]
    visible = j <= i
    if window is not None:
        visible &= j > i - window
    if blocks is not None and (blocks >= 0).any():
        cached = keys - queries
        visible[:, cached:] |= (blocks[:, None] == blocks[None, :]) & (blocks[:, None] >= 0)
    return mx.array(visible)


def image_blocks(is_image: np.ndarray) -> np.ndarray:
    """int [S]: a number for every contiguous run of image positions, -1 elsewhere."""
    starts = is_image & ~np.concatenate([[False], is_image[:-1]])
    return np.where(is_image, np.cumsum(starts) - 1, -1)
