"""Soft embeddings: the expected embedding under the tempered logits, the next step's
self-conditioning.

Contract: tempered logits are cast to the embedding dtype, softmax runs in float32, its weights are
cast to the embedding dtype, multiplied with the embedding table, and scaled by sqrt(hidden)
rounded to that dtype. The row's log_z comes from its statistics; the weights are divided by their
own sum at the end, so that what the casts (or, in the sparse path, the cut) took away is given
back in proportion.

The vocabulary is walked slice by slice, so there is no [rows, vocabulary] array beyond the logits.
`sparse_embeddings` sums over the likely tokens alone.
"""

import functools
import math
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_dgemma.kernels.elementwise import fused
from mlx_dgemma.kernels.matrix import Matrix
from mlx_dgemma.kernels.row_statistics import SLICE, Exponentials, Head, temper, tempering

_COLUMNS = SLICE // 2  # of the table, multiplied at a time by the dense path


def soft_embeddings(
    raw_logits: mx.array,
    log_z: mx.array,
    temperature: float | mx.array,
    table: Matrix,
    *,
    softcap: float = 30.0,
    scale: float | None = None,
) -> mx.array:
    """Dense soft embeddings [R, H] of raw logits [R, V] in the table's dtype.

    `log_z` [R] is from the row statistics of the same logits at the same temperature.
    """
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
    table: Matrix,
    *,
    softcap: float = 30.0,
    scale: float | None = None,
) -> mx.array:
    """Dense soft embeddings from slices of raw logits, `head(start, stop)` -> [R, stop - start]."""
    summed, total = unscaled_soft_embeddings(head, log_z, temperature, table, softcap=softcap)
    return scale_embeddings((summed / total).astype(table.dtype), scale)


def unscaled_soft_embeddings(
    head: Head,
    log_z: mx.array,
    temperature: float | mx.array,
    table: Matrix,
    *,
    softcap: float,
) -> tuple[mx.array, mx.array]:
    """float32 sums over the table's rows, of the weighted rows [R, H] and of the weights [R, 1]."""
    divisor = tempering(temperature, log_z.shape[0])
    total = mx.zeros((log_z.shape[0], 1), dtype=mx.float32)
    summed = mx.zeros((log_z.shape[0], table.columns), dtype=mx.float32)
    for start in range(0, table.weight.shape[0], _COLUMNS):
        stop = min(start + _COLUMNS, table.weight.shape[0])
        raw = head(start, stop)
        if start:  # one slice in memory at a time
            raw, _ = mx.depends([raw, divisor], [summed, total])
        weights = probabilities(raw, divisor, log_z, softcap, table.dtype, table.dtype)
        summed = summed + table.rows(start, stop).apply(weights, transpose=False).astype(mx.float32)
        total = total + weights.astype(mx.float32).sum(axis=1, keepdims=True)
    return summed, total


def kept_soft_embeddings(
    kept: Sequence[Exponentials],
    log_z: mx.array,
    table: Matrix,
    *,
    scale: float | None = None,
) -> mx.array:
    """Dense soft embeddings [R, H] from what a row's statistics were made of, slice by slice.

    kept: the exponentials of a slice of the vocabulary each. log_z: float32 [R].

    Neither head nor softcap nor exponential is computed again. The tempered logits are not cast
    to the table's dtype, so this is the contract's result for float32 tables alone.
    """
    total = mx.zeros((log_z.shape[0], 1), dtype=mx.float32)
    summed = mx.zeros((log_z.shape[0], table.columns), dtype=mx.float32)
    start = 0
    for values, maximum, sums in kept:
        stop = start + values.shape[1]
        share = mx.exp(maximum - log_z)[:, None]
        summed = summed + share * table.rows(start, stop).apply(values, transpose=False)
        total = total + share * sums[:, None]
        start = stop
    return scale_embeddings((summed / total).astype(table.dtype), scale)


def probabilities(
    raw: mx.array,
    divisor: mx.array,
    log_z: mx.array,
    softcap: float,
    dtype: mx.Dtype,
    result: mx.Dtype = mx.float32,
) -> mx.array:
    """Probabilities of raw logits [R, n], from tempered logits cast to `dtype`; in one launch,
    or where MLX's CPU backend rounds to 16 bits in three."""
    cap = mx.array(softcap, dtype=mx.float32)
    return _probability(dtype, result)(raw, cap, divisor, log_z[:, None])


@functools.cache
def _probability(dtype: mx.Dtype, result: mx.Dtype) -> Callable[..., mx.array]:
    """e^(tempered - log_z), the tempered logit rounded to `dtype` and the value to `result`."""

    @fused
    def probability(
        raw: mx.array, softcap: mx.array, divisor: mx.array, log_z: mx.array
    ) -> mx.array:
        rounded = temper(raw, softcap, divisor).astype(dtype).astype(mx.float32)
        return mx.exp(rounded - log_z).astype(result)

    return probability


def scale_embeddings(rows: mx.array, scale: float | None = None) -> mx.array:
    """Rows [n, H] times `scale`, by default sqrt(H), rounded to the rows' dtype first."""
    factor = math.sqrt(rows.shape[-1]) if scale is None else scale
    return rows * mx.array(factor, dtype=rows.dtype)
