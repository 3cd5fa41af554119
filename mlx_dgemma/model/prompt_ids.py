"""The ids that an encoder pass reads: their form, and the spans that are read at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_dgemma.errors import InputError


def token_ids(ids: Any, vocabulary: int) -> np.ndarray:
    """int32 [S], of one prompt given as [S] or [1, S]."""
    tokens = np.array(ids)
    one = tokens.ndim == 1 or (tokens.ndim == 2 and len(tokens) == 1)
    if not one or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise InputError(
            "The encoder pass reads whole numbers of one prompt, [S] or [1, S], not "
            f"{tokens.dtype} {list(tokens.shape)}."
        )
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise InputError(f"Token ids must be between 0 and {vocabulary - 1}.")
    return tokens.astype(np.int32).reshape(-1)


def chunks(offset: int, count: int, size: int, blocks: np.ndarray | None) -> list[tuple[int, int]]:
    """Spans of at most `size` new tokens that end on absolute multiples of `size`; a span that
    would cut an image block is stretched to the block's end."""
    spans, start = [], 0
    while start < count:
        stop = min(count, start + size - (offset + start) % size)
        while blocks is not None and stop < count and 0 <= blocks[stop] == blocks[stop - 1]:
            stop += 1
        spans.append((start, stop))
        start = stop
    return spans
