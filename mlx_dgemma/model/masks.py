"""Who sees whom: boolean masks [queries, keys], built only where something is hidden.

The decoder pass needs none: a canvas sees itself and the whole context, and a sliding layer's
limit is a slice of the keys. The encoder pass is causal, with a window on sliding layers and
with image blocks whose members see each other.
"""

from __future__ import annotations

from functools import lru_cache

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
    if blocks is None or not (blocks >= 0).any():
        return _text_mask(first_query - first_key, queries, keys, window)
    visible = _visible(first_query - first_key, queries, keys, window)
    cached = keys - queries
    visible[:, cached:] |= (blocks[:, None] == blocks[None, :]) & (blocks[:, None] >= 0)
    return mx.array(visible)


@lru_cache(maxsize=16)  # what the layers of a chunk share, and most chunks with each other
def _text_mask(ahead: int, queries: int, keys: int, window: int | None) -> mx.array:
    return mx.array(_visible(ahead, queries, keys, window))


def _visible(ahead: int, queries: int, keys: int, window: int | None) -> np.ndarray:
    """bool [queries, keys] without images; the first query stands `ahead` of the first key."""
    i = np.arange(ahead, ahead + queries)[:, None]
    j = np.arange(keys)[None, :]
    visible = j <= i
    if window is not None:
        visible &= j > i - window
    return visible


def image_blocks(is_image: np.ndarray) -> np.ndarray:
    """int [S]: a number for every contiguous run of image positions, -1 elsewhere."""
    starts = is_image & ~np.concatenate([[False], is_image[:-1]])
    return np.where(is_image, np.cumsum(starts) - 1, -1)
