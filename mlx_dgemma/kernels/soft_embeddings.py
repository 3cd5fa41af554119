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

Metal kernels: checked by emulation on Linux; not yet run on Apple hardware.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.kernels import dispatch, registry
from mlx_dgemma.kernels.matrix import DENSE, Matrix
from mlx_dgemma.kernels.probed_levels import PROBED_TEMPERATURE, levels, tempered_level
from mlx_dgemma.kernels.row_statistics import SLICE, Exponentials, Head, tempered, tempering
from mlx_dgemma.kernels.samples import dtype_named, random_matrix

DROPPED_MASS = 2.0**-8
CAPACITY = 1024
_COLUMNS = SLICE // 2  # of the table, multiplied at a time by the dense path
_GATHERED_ROWS = 16384  # embedding rows gathered at a time by the sparse twin


class Survivors(NamedTuple):
    """The tokens that carry a row's probability, in vocabulary order."""

    ids: mx.array  # [R, capacity] int32; 0 behind the last survivor
    weights: mx.array  # [R, capacity] float32 probabilities; 0 behind the last survivor
    counts: mx.array  # [R] int32
    dropped: mx.array  # [R] float32, the probability left out


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
    divisor = tempering(temperature, log_z.shape[0])
    total = mx.zeros((log_z.shape[0], 1), dtype=mx.float32)
    summed = mx.zeros((log_z.shape[0], table.columns), dtype=mx.float32)
    for start in range(0, table.weight.shape[0], _COLUMNS):
        stop = min(start + _COLUMNS, table.weight.shape[0])
        raw = head(start, stop)
        if start:  # one slice in memory at a time
            raw, _ = mx.depends([raw, divisor], [summed, total])
        weights = probabilities(raw, divisor, log_z, softcap, table.dtype).astype(table.dtype)
        summed = summed + table.rows(start, stop).apply(weights, transpose=False).astype(mx.float32)
        total = total + weights.astype(mx.float32).sum(axis=1, keepdims=True)
    return scale_embeddings((summed / total).astype(table.dtype), scale)


def kept_soft_embeddings(
    kept: Sequence[Exponentials],
    log_z: mx.array,
    table: Matrix,
    *,
    scale: float | None = None,
) -> mx.array:
    """Dense soft embeddings from what a row's statistics were made of, slice by slice.

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
    rows, vocabulary = raw_logits.shape
    sizes = (raw_logits.dtype, dtype, rows, vocabulary, capacity)
    run = survivors_metal if dispatch.use(SELECT, *sizes) else survivors_twin
    return run(raw_logits, log_z, temperature, dtype, softcap=softcap, capacity=capacity)


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
    table: Matrix,
    *,
    width: int | None = None,
    scale: float | None = None,
) -> mx.array:
    """Soft embeddings [R, H] of the survivors alone, their weights renormalised.

    `width`, if the host knows it, is an upper bound on `counts`; columns behind it are not visited.
    """
    rows, capacity = survivors.ids.shape
    sizes = (table.dtype, table.packing, table.columns, rows, capacity)
    if dispatch.use(GATHER, *sizes):
        return gather_metal(survivors, table, scale=scale)
    return gather_twin(survivors, table, width=width, scale=scale)


def gather_twin(
    survivors: Survivors,
    table: Matrix,
    *,
    width: int | None = None,
    scale: float | None = None,
) -> mx.array:
    """The same in plain MLX operations, over blocks of rows so that the gather stays small."""
    width = survivors.ids.shape[1] if width is None else min(width, survivors.ids.shape[1])
    block = max(1, _GATHERED_ROWS // max(1, width))
    blocks: list[mx.array] = []
    for start in range(0, survivors.ids.shape[0], block):
        ids = survivors.ids[start : start + block, :width]
        weights = survivors.weights[start : start + block, :width].astype(table.dtype)
        if blocks:
            ids, weights = mx.depends([ids, weights], [blocks[-1]])
        rows = table.take(ids)
        total = weights.astype(mx.float32).sum(axis=1, keepdims=True)
        blocks.append((weights[:, None, :] @ rows)[:, 0].astype(mx.float32) / total)
    return scale_embeddings(mx.concatenate(blocks).astype(table.dtype), scale)


_THREADS = 256
_SURVIVORS = registry.Kernel(
    "survivors",
    inputs=("logits", "temperature", "log_z", "settings"),
    outputs=("ids", "weights", "counts", "dropped"),
)
_GATHER = registry.Kernel(
    "gather_embeddings",
    inputs=("ids", "weights", "counts", "w", "scales", "biases", "factor"),
    outputs=("y",),
)


def _supports_logits(shape: registry.Shape) -> bool:
    floats = registry.is_float(shape) and registry.is_float(shape, "table")
    return floats and int(shape["vocabulary"]) > 0


def _supports_table(shape: registry.Shape) -> bool:
    """Dense, or affine with 4 or 8 bits."""
    packing = str(shape["table"]).split("/")[0]
    return registry.is_float(shape) and packing in (DENSE, "affine 4", "affine 8")


def survivors_metal(
    raw_logits: mx.array,
    log_z: mx.array,
    temperature: float | mx.array,
    dtype: mx.Dtype,
    *,
    softcap: float = 30.0,
    capacity: int = CAPACITY,
) -> Survivors:
    """The same selection as one Metal kernel, a threadgroup per row."""
    rows = raw_logits.shape[0]
    outputs = registry.launch(
        _SURVIVORS,
        [
            raw_logits,
            mx.broadcast_to(tempering(temperature, rows)[:, 0], (rows,)),
            log_z,
            mx.array([softcap, 1.0 / capacity], dtype=mx.float32),
        ],
        template=[
            ("T", raw_logits.dtype),
            ("E", dtype),
            ("TG", _THREADS),
            ("CAPACITY", capacity),
        ],
        grid=(_THREADS, rows, 1),
        threadgroup=(_THREADS, 1, 1),
        outputs=[
            ((rows, capacity), mx.int32),
            ((rows, capacity), mx.float32),
            ((rows,), mx.int32),
            ((rows,), mx.float32),
        ],
    )
    return Survivors(*outputs)


def gather_metal(survivors: Survivors, table: Matrix, *, scale: float | None = None) -> mx.array:
    """The same gather as one Metal kernel; a row costs what it has survivors."""
    rows, hidden = survivors.ids.shape[0], table.columns
    bits = table.bits if table.quantized else 0
    threads = -(-hidden // (8 if bits == 4 else 4))
    scales = survivors.weights if table.scales is None else table.scales
    return registry.launch(
        _GATHER,
        [
            survivors.ids,
            survivors.weights,
            survivors.counts,
            table.weight,
            scales,
            scales if table.biases is None else table.biases,
            mx.array([math.sqrt(hidden) if scale is None else scale], dtype=table.dtype),
        ],
        template=[("T", table.dtype), ("BITS", bits), ("GROUP", table.group_size)],
        grid=(threads, rows, 1),
        threadgroup=(min(threads, 128), 1, 1),
        outputs=[((rows, hidden), table.dtype)],
    )[0]


def _survivor_probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    """Rows of a few likely tokens and many that are cut, about two hundredths of the mass.

    No probability is near the threshold, and no tempered logit near the middle of two numbers of
    the table's dtype: there a last digit decides.
    """
    dtype, table = dtype_named(shape["dtype"]), dtype_named(shape["table"])
    capacity, vocabulary = int(shape["capacity"]), int(shape["vocabulary"])
    likely, unlikely, mass = levels(capacity)
    for rows, columns in ((2, 33), (3, 2 * _THREADS * 8 + 1), (int(shape["rows"]), vocabulary)):
        cut = min(columns - 3, round(0.02 / mass))
        place = (mx.arange(columns)[None] * 7 + mx.arange(rows)[:, None] * 5) % columns
        raw = mx.where(place < cut + 3, unlikely, -300.0)
        raw = mx.where(place < 3, likely, raw).astype(dtype)
        log_z = mx.full((rows,), tempered_level(likely) + math.log(3.0 / 0.98))
        arguments = (raw, log_z, PROBED_TEMPERATURE, table)
        yield registry.Probe(
            metal=partial(survivors_metal, *arguments, capacity=capacity),
            twin=partial(survivors_twin, *arguments, capacity=capacity),
            tolerance=1e-4,
            least=1.0,  # what was dropped is one minus nearly one
        )


def _gather_probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    dtype, capacity = dtype_named(shape["dtype"]), int(shape["capacity"])
    hidden = int(shape["hidden"])
    table = random_matrix((1024, hidden), str(shape["table"]), dtype, mx.random.key(0))
    factor = float(np.array(mx.array(math.sqrt(hidden)).astype(dtype).astype(mx.float32)))
    for rows, most in ((2, 1), (3, min(40, capacity)), (int(shape["rows"]), min(64, capacity))):
        counts = (mx.arange(rows) * 7) % most + 1
        filled = mx.arange(capacity)[None, :] < counts[:, None]
        ids = mx.random.randint(0, 1024, (rows, capacity), key=mx.random.key(rows))
        weights = mx.random.uniform(0.01, 1.0, (rows, capacity), key=mx.random.key(most))
        survivors = Survivors(
            mx.where(filled, ids, 0).astype(mx.int32),
            mx.where(filled, weights, 0.0),
            counts.astype(mx.int32),
            mx.zeros((rows,)),
        )
        cast = survivors._replace(weights=survivors.weights.astype(dtype).astype(mx.float32))
        mx.eval(survivors, cast)  # else they would be timed with the kernel and with its twin
        yield registry.Probe(
            metal=partial(gather_metal, survivors, table),
            twin=partial(gather_twin, survivors, table, width=most),
            tolerance={mx.float32: 1e-4, mx.float16: 5e-3}.get(dtype, 2e-2),
            expected=partial(gather_twin, cast, table.widened(), width=most, scale=factor),
        )


SELECT = registry.Operation(
    "survivors",
    ("dtype", "table", "rows", "vocabulary", "capacity"),
    (_SURVIVORS,),
    _supports_logits,
    _survivor_probes,
)
GATHER = registry.Operation(
    "gather_embeddings",
    ("dtype", "table", "hidden", "rows", "capacity"),
    (_GATHER,),
    _supports_table,
    _gather_probes,
)
