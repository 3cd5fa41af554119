"""Attention of a canvas over key segments, merged online; for head_dim 512, which MLX does not
fuse.

Keys come in segments: the context's cached prefix, one for every canvas of a batch, and the
canvas's own keys. Nothing is concatenated and nothing is masked: every query sees every key it is
given. The query heads of a key head are folded into rows, and so is the batch where a segment is
shared, so that keys are read once and each product is one matrix multiplication over `chunk` keys.
Scores, softmax and the accumulated output are float32.
"""

from collections.abc import Sequence

import mlx.core as mx

_LOWEST = -3e38  # below every score and, unlike -Inf, safe to subtract

Segment = tuple[mx.array, mx.array]


def attend(
    queries: mx.array, segments: Sequence[Segment], *, scale: float = 1.0, chunk: int = 4096
) -> mx.array:
    """Attention output [B, heads, L, head_dim] over all keys of all segments.

    `queries` [B, heads, L, head_dim]; a segment is (keys, values) [B or 1, kv heads, S, head_dim].
    """
    return twin(queries, segments, scale=scale, chunk=chunk)


def twin(
    queries: mx.array, segments: Sequence[Segment], *, scale: float = 1.0, chunk: int = 4096
) -> mx.array:
    """The same in plain MLX operations: two products and an online merge per chunk of keys."""
    batch, heads, length, _ = queries.shape
    shape = (batch, heads, length)
    maximum = mx.full((*shape, 1), _LOWEST, dtype=mx.float32)
    total = mx.zeros((*shape, 1), dtype=mx.float32)
    output = mx.zeros((*shape, segments[0][1].shape[-1]), dtype=mx.float32)
    for keys, values in segments:
        shared = keys.shape[0] == 1 and batch > 1
        folded = _fold(queries * scale, keys.shape[1], shared)
        for start in range(0, keys.shape[2], chunk):
            k, v = keys[:, :, start : start + chunk], values[:, :, start : start + chunk]
            scores = (folded @ k.swapaxes(2, 3)).astype(mx.float32)
            local = scores.max(axis=-1, keepdims=True)
            weights = mx.exp(scores - local)
            local_total = weights.sum(axis=-1, keepdims=True)
            local_output = (weights.astype(v.dtype) @ v).astype(mx.float32)
            parts = (_unfold(part, shape, shared) for part in (local, local_total, local_output))
            maximum, total, output = _merge((maximum, total, output), tuple(parts))
    return (output / total).astype(queries.dtype)


def _fold(queries: mx.array, kv_heads: int, shared: bool) -> mx.array:
    """[B, heads, L, D] -> [B, kv heads, group * L, D], or [1, kv heads, B * group * L, D]."""
    batch, heads, length, head_dim = queries.shape
    folded = queries.reshape(batch, kv_heads, (heads // kv_heads) * length, head_dim)
    if shared:
        folded = folded.swapaxes(0, 1).reshape(1, kv_heads, -1, head_dim)
    return folded


def _unfold(rows: mx.array, shape: tuple[int, int, int], shared: bool) -> mx.array:
    batch, heads, length = shape
    if shared:
        kv_heads = rows.shape[1]
        rows = rows.reshape(kv_heads, batch, -1, rows.shape[-1]).swapaxes(0, 1)
    return rows.reshape(batch, heads, length, -1)


def _merge(
    one: tuple[mx.array, ...], two: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array, mx.array]:
    maximum = mx.maximum(one[0], two[0])
    left, right = mx.exp(one[0] - maximum), mx.exp(two[0] - maximum)
    return maximum, one[1] * left + two[1] * right, one[2] * left + two[2] * right
