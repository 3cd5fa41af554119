"""Sparse soft embeddings: the expected embedding of a row summed over its likely tokens alone.

Only tokens whose probability reaches 1 / capacity survive, so a row has at most `capacity` of them.
A row may be summed this way where it lost less than `DROPPED_MASS`: its error is then bounded by
twice that mass times the largest embedding, below the rounding of bfloat16 logits. Rows are
independent: in one step some are summed so and the others densely (see soft_embeddings).

Metal kernels: checked by emulation on Linux; not yet run on Apple hardware.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.kernels import dispatch, registry
from mlx_dgemma.kernels.matrix import DENSE, Matrix
from mlx_dgemma.kernels.probed_levels import PROBED_TEMPERATURE, levels, tempered_level
from mlx_dgemma.kernels.row_statistics import SLICE, tempering
from mlx_dgemma.kernels.samples import dtype_named, random_matrix
from mlx_dgemma.kernels.soft_embeddings import probabilities, scale_embeddings

DROPPED_MASS = 2.0**-8
CAPACITY = 8192  # to gather so many embeddings costs a little less than a dense row
_GATHERED_ROWS = 16384  # embedding rows gathered at a time by the twin


class Survivors(NamedTuple):
    """The tokens that carry a row's probability, in vocabulary order."""

    ids: mx.array  # [R, capacity] int32; 0 after the last survivor
    weights: mx.array  # [R, capacity] float32 probabilities; 0 after the last survivor
    counts: mx.array  # [R] int32
    dropped: mx.array  # [R] float32, the probability left out


def most_entropy(vocabulary: int, capacity: int = CAPACITY) -> float:
    """The highest entropy (nats) of a row that loses less than `DROPPED_MASS`.

    All but that mass is spread evenly over `capacity` tokens, the rest over the whole vocabulary.
    """
    rest = DROPPED_MASS
    kept = 1.0 - rest
    return kept * math.log(capacity / kept) + rest * math.log(vocabulary / rest)


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

    `gather_soft_embeddings` is right for the rows with dropped < DROPPED_MASS.
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
    counts: np.ndarray,
    *,
    scale: float | None = None,
) -> mx.array:
    """Soft embeddings [R, H] of the survivors alone, their weights renormalised.

    counts: int [R], how many survivors of each row to sum: all of them, or 0 for a row that is not
        to be summed and comes out as zeros.
    """
    rows, capacity = survivors.ids.shape
    sizes = (table.dtype, table.packing, table.columns, rows, capacity)
    run = gather_metal if dispatch.use(GATHER, *sizes) else gather_twin
    return run(survivors, table, counts, scale=scale)


def gather_twin(
    survivors: Survivors,
    table: Matrix,
    counts: np.ndarray,
    *,
    scale: float | None = None,
) -> mx.array:
    """The same in plain MLX operations: rows with about as many survivors side by side, a few at a
    time so that the gather stays small."""
    soft = mx.zeros((survivors.ids.shape[0], table.columns), dtype=table.dtype)
    widths = np.minimum(rounded_up(counts), survivors.ids.shape[1])
    for width in np.unique(widths[widths > 0]).tolist():
        equal = np.flatnonzero(widths == width)
        block = max(1, _GATHERED_ROWS // width)
        for start in range(0, equal.size, block):
            some = mx.array(equal[start : start + block])
            ids, weights = survivors.ids[some, :width], survivors.weights[some, :width]
            ids, weights = mx.depends([ids, weights.astype(table.dtype)], [soft])
            total = weights.astype(mx.float32).sum(axis=1, keepdims=True)
            summed = (weights[:, None, :] @ table.take(ids))[:, 0].astype(mx.float32)
            soft[some] = (summed / total).astype(table.dtype)
    return scale_embeddings(soft, scale)


def rounded_up(counts: np.ndarray) -> np.ndarray:
    """The next power of two of each count, int64 [n]; 0 stays 0."""
    counts = np.asarray(counts)
    powers = 1 << np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int64)
    return np.where(counts > 0, powers, 0)


_THREADS = 256
_PARTS = 8  # of a row's survivors, summed side by side
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


def gather_metal(
    survivors: Survivors, table: Matrix, counts: np.ndarray, *, scale: float | None = None
) -> mx.array:
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
            mx.array(counts.astype(np.int32)),
            table.weight,
            scales,
            scales if table.biases is None else table.biases,
            mx.array([math.sqrt(hidden) if scale is None else scale], dtype=table.dtype),
        ],
        template=[
            ("T", table.dtype),
            ("BITS", bits),
            ("GROUP", table.group_size),
            ("PARTS", _PARTS),
        ],
        grid=(-(-threads // 32) * 32, rows * _PARTS, 1),
        threadgroup=(32, _PARTS, 1),
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
    for rows, most in ((2, 1), (3, min(40, capacity)), (int(shape["rows"]), min(300, capacity))):
        counts = np.arange(rows) * 149 % (most + 1)
        filled = mx.arange(capacity)[None, :] < mx.array(counts)[:, None]
        ids = mx.random.randint(0, 1024, (rows, capacity), key=mx.random.key(rows))
        weights = mx.random.uniform(0.01, 1.0, (rows, capacity), key=mx.random.key(most))
        survivors = Survivors(
            mx.where(filled, ids, 0).astype(mx.int32),
            mx.where(filled, weights, 0.0),
            mx.array(counts.astype(np.int32)),
            mx.zeros((rows,)),
        )
        cast = survivors._replace(weights=survivors.weights.astype(dtype).astype(mx.float32))
        mx.eval(survivors, cast)  # else they would be timed with the kernel and with its twin
        yield registry.Probe(
            metal=partial(gather_metal, survivors, table, counts),
            twin=partial(gather_twin, survivors, table, counts),
            tolerance={mx.float32: 1e-4, mx.float16: 5e-3}.get(dtype, 2e-2),
            expected=partial(gather_twin, cast, table.widened(), counts, scale=factor),
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
