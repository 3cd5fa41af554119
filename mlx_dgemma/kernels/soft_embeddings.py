"""Soft embeddings: the expected embedding under the tempered logits, the next step's
self-conditioning.

Contract: tempered logits are cast to the embedding dtype, softmax runs in float32, its weights are
cast to the embedding dtype, multiplied with the embedding table, and scaled by sqrt(hidden)
rounded to that dtype. The row's log_z comes from its statistics; the weights are divided by their
own sum at the end, so that what the casts (or, in the sparse path, the cut) took away is given
back in proportion.

Dense path: slice by slice of the vocabulary, so no [rows, vocabulary] array beyond the logits.
Sparse path: only tokens whose probability reaches 1 / capacity survive, so a row has at most
`capacity` of them. It is used for a step only where every row lost less than `DROPPED_MASS`; the
error is then bounded by twice that mass times the largest embedding, below the rounding of
bfloat16 logits.
"""

import math
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma.kernels.matrix import Matrix
from mlx_dgemma.kernels.row_statistics import SLICE, Head, tempered, tempering

DROPPED_MASS = 2.0**-8
CAPACITY = 1024
_GATHERED_ROWS = 16384  # embedding rows gathered at a time by the sparse twin


class Survivors(NamedTuple):
    """The tokens that carry a row's probability, in vocabulary order."""

    ids: mx.array  # [R, capacity] int32; 0 behind the last survivor
    weights: mx.array  # [R, capacity] float32 probabilities; 0 behind the last survivor
    counts: mx.array  # [R] int32
    dropped: mx.array  # [R] float32, the probability left out


def soft_embeddings(
    raw_logits: mx.array,
    maximum: mx.array,
    log_z: mx.array,
    temperature: float | mx.array,
    table: Matrix | mx.array | nn.Module,
    *,
    softcap: float = 30.0,
    scale: float | None = None,
) -> mx.array:
    """Dense soft embeddings [R, H] of raw logits [R, V] in the table's dtype.

    `maximum` and `log_z` [R] are the row statistics of the same logits at the same temperature.
    """
    return twin(raw_logits, maximum, log_z, temperature, table, softcap=softcap, scale=scale)


def twin(
    raw_logits: mx.array,
    maximum: mx.array,
    log_z: mx.array,
    temperature: float | mx.array,
    table: Matrix | mx.array | nn.Module,
    *,
    softcap: float = 30.0,
    scale: float | None = None,
) -> mx.array:
    """The dense path in plain MLX operations; temporaries never exceed one slice."""
    return sliced_soft_embeddings(
        lambda start, stop: raw_logits[:, start:stop],
        log_z,
        temperature,
        table,
        softcap=softcap,
        scale=scale,
    )


def sliced_soft_embeddings(
    head: Head,
    log_z: mx.array,
    temperature: float | mx.array,
    table: Matrix | mx.array | nn.Module,
    *,
    softcap: float = 30.0,
    scale: float | None = None,
) -> mx.array:
    """Dense soft embeddings from slices of raw logits, `head(start, stop)` -> [R, stop - start]."""
    matrix = Matrix.of(table)
    divisor = tempering(temperature, log_z.shape[0])
    total = mx.zeros((log_z.shape[0], 1), dtype=mx.float32)
    summed = mx.zeros((log_z.shape[0], matrix.columns), dtype=mx.float32)
    for start in range(0, matrix.weight.shape[0], SLICE):
        stop = min(start + SLICE, matrix.weight.shape[0])
        raw = head(start, stop)
        if start:  # one slice in memory at a time
            raw, _ = mx.depends([raw, divisor], [summed, total])
        weights = probabilities(raw, divisor, log_z, softcap, matrix.dtype).astype(matrix.dtype)
        summed = summed + matrix.rows(start, stop).apply(weights, transpose=False).astype(
            mx.float32
        )
        total = total + weights.astype(mx.float32).sum(axis=1, keepdims=True)
    return scale_embeddings((summed / total).astype(matrix.dtype), scale)


def probabilities(
    raw: mx.array, divisor: mx.array, log_z: mx.array, softcap: float, dtype: mx.Dtype
) -> mx.array:
    """float32 probabilities of raw logits [R, n], from tempered logits cast to `dtype`."""
    values = tempered(raw, mx.array(softcap, dtype=mx.float32), divisor)
    if dtype != mx.float32:
        values = values.astype(dtype).astype(mx.float32)
    return mx.exp(values - log_z[:, None])


def scale_embeddings(rows: mx.array, scale: float | None = None) -> mx.array:
    """Times `scale`, by default sqrt(hidden), rounded to the rows' dtype first."""
    factor = math.sqrt(rows.shape[-1]) if scale is None else scale
    return rows * mx.array(factor, dtype=rows.dtype)


def select_survivors(
    raw_logits: mx.array,
    log_z: mx.array,
    temperature: float | mx.array,
    dtype: mx.Dtype,
    *,
    softcap: float = 30.0,
    capacity: int = CAPACITY,
) -> Survivors:
    """The tokens of each row [R, V] whose probability is at least 1 / capacity.

    Read `counts.max()` and `dropped.max()` with the step's status; `gather_soft_embeddings` is
    right for these rows if dropped.max() < DROPPED_MASS.
    """
    return survivors_twin(raw_logits, log_z, temperature, dtype, softcap=softcap, capacity=capacity)


def survivors_twin(
    raw_logits: mx.array,
    log_z: mx.array,
    temperature: float | mx.array,
    dtype: mx.Dtype,
    *,
    softcap: float = 30.0,
    capacity: int = CAPACITY,
) -> Survivors:
    """The same in plain MLX operations: a running count places each survivor of each slice."""
    rows, vocabulary = raw_logits.shape
    divisor = tempering(temperature, rows)
    spill = capacity  # one column more, where everything that does not survive is written
    ids = mx.zeros((rows, capacity + 1), dtype=mx.int32)
    weights = mx.zeros((rows, capacity + 1), dtype=mx.float32)
    count = mx.zeros((rows, 1), dtype=mx.int32)
    total = mx.zeros((rows, 1), dtype=mx.float32)
    for start in range(0, vocabulary, SLICE):
        raw = raw_logits[:, start : start + SLICE]
        if start:
            raw, _ = mx.depends([raw, divisor], [ids, weights, count])
        p = probabilities(raw, divisor, log_z, softcap, dtype)
        survives = p >= 1.0 / capacity
        place = count + mx.cumsum(survives.astype(mx.int32), axis=1) - 1
        place = mx.where(mx.logical_and(survives, place < capacity), place, spill)
        columns = mx.arange(start, start + raw.shape[1], dtype=mx.int32)
        ids = mx.put_along_axis(ids, place, mx.broadcast_to(columns, place.shape), axis=1)
        weights = mx.put_along_axis(weights, place, p, axis=1)
        count = count + survives.astype(mx.int32).sum(axis=1, keepdims=True)
        total = total + p.sum(axis=1, keepdims=True)
    ids, weights = ids[:, :capacity], weights[:, :capacity]
    kept = weights.sum(axis=1)
    dropped = 1.0 - kept / total[:, 0]
    return Survivors(ids, weights, mx.minimum(count[:, 0], capacity), dropped)


def gather_soft_embeddings(
    survivors: Survivors,
    table: Matrix | mx.array | nn.Module,
    *,
    width: int | None = None,
    scale: float | None = None,
) -> mx.array:
    """Soft embeddings [R, H] of the survivors alone, their weights renormalised.

    `width`, if the host knows it, is an upper bound on `counts`; columns behind it are not visited.
    """
    return gather_twin(survivors, table, width=width, scale=scale)


def gather_twin(
    survivors: Survivors,
    table: Matrix | mx.array | nn.Module,
    *,
    width: int | None = None,
    scale: float | None = None,
) -> mx.array:
    """The same in plain MLX operations, over blocks of rows so that the gather stays small."""
    matrix = Matrix.of(table)
    width = survivors.ids.shape[1] if width is None else min(width, survivors.ids.shape[1])
    block = max(1, _GATHERED_ROWS // max(1, width))
    blocks: list[mx.array] = []
    for start in range(0, survivors.ids.shape[0], block):
        ids = survivors.ids[start : start + block, :width]
        weights = survivors.weights[start : start + block, :width].astype(matrix.dtype)
        if blocks:
            ids, weights = mx.depends([ids, weights], [blocks[-1]])
        rows = matrix.take(ids)
        total = weights.astype(mx.float32).sum(axis=1, keepdims=True)
        blocks.append((weights[:, None, :] @ rows)[:, 0].astype(mx.float32) / total)
    return scale_embeddings(mx.concatenate(blocks).astype(matrix.dtype), scale)
