"""Queries, keys and values: norm, rope, and the write behind the cached prefix.

Queries and keys take RMSNorm with weight, then rope; values take RMSNorm without. Full layers have
no value projection: their values are the normed raw keys. Rope turns the pairs (i, i + head_dim /
2) by position * inverse_frequencies[i], a frequency of zero leaving a pair alone; angles are
float32, cosine and sine are rounded to the activation dtype first.
"""

from typing import NamedTuple

import mlx.core as mx


class Projected(NamedTuple):
    """Heads first, ready for attention."""

    queries: mx.array  # [B, heads, L, head_dim]
    keys: mx.array  # [B, kv heads, L, head_dim]
    values: mx.array  # [B, kv heads, L, head_dim]


def norm_rope(
    queries: mx.array,
    keys: mx.array,
    values: mx.array | None,
    query_weight: mx.array,
    key_weight: mx.array,
    inverse_frequencies: mx.array,
    offset: int | mx.array,
    *,
    eps: float = 1e-6,
) -> Projected:
    """Norms and rope of projections [B, L, heads, head_dim]; values None takes the raw keys.

    `inverse_frequencies` [head_dim / 2] float32; row l has the position offset + l.
    """
    return twin(
        queries, keys, values, query_weight, key_weight, inverse_frequencies, offset, eps=eps
    )


def twin(
    queries: mx.array,
    keys: mx.array,
    values: mx.array | None,
    query_weight: mx.array,
    key_weight: mx.array,
    inverse_frequencies: mx.array,
    offset: int | mx.array,
    *,
    eps: float = 1e-6,
) -> Projected:
    """The same in plain MLX operations."""
    raw_values = keys if values is None else values
    positions = mx.arange(queries.shape[1], dtype=mx.float32) + mx.array(offset, dtype=mx.float32)
    angles = positions[:, None] * inverse_frequencies[None, :]
    cosine, sine = mx.cos(angles).astype(queries.dtype), mx.sin(angles).astype(queries.dtype)
    return Projected(
        rotate(mx.fast.rms_norm(queries, query_weight, eps).swapaxes(1, 2), cosine, sine),
        rotate(mx.fast.rms_norm(keys, key_weight, eps).swapaxes(1, 2), cosine, sine),
        mx.fast.rms_norm(raw_values, None, eps).swapaxes(1, 2),
    )


def rotate(x: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    """Rope on the last axis in halves: x [..., L, head_dim], cosine and sine [L, head_dim / 2]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return mx.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def write_behind(buffer: mx.array, rows: mx.array, offset: int | mx.array) -> mx.array:
    """rows [B, kv heads, L, head_dim] at `offset` of a preallocated buffer's third axis."""
    start = mx.array(offset, dtype=mx.int32).reshape(1)
    return mx.slice_update(buffer, rows, start, axes=(2,))
