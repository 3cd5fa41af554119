"""Row statistics over the vocabulary: all that decoding wants to know of a row of raw logits, in
one pass.

For a row x of raw logits the tempered logits are t = softcap * tanh(x / softcap) / T, all in
float32. A row gives its entropy (nats), its argmax (lowest index on ties), one sample of
softmax(t), and (max, log_z), from which exp(t - log_z) recovers any probability later.

The vocabulary is walked in slices of `SLICE` columns. A slice keeps its maximum m, Z = sum e^(t -
m), S = sum e^(t - m) (t - m) and one candidate sample; the slices merge into entropy = log Z - S /
Z. The sample is an inverse CDF on two levels: the row's first uniform picks the slice by its share
of Z, the second picked the candidate inside that slice. So a sample needs two uniforms and no
[rows, vocabulary] noise, has the distribution of a multinomial draw, and is the same whether the
logits were held whole or were made slice by slice.

NaN or Inf in a row of logits (the softcap alone would hide an Inf) makes its entropy NaN.

Metal kernels: checked by emulation on Linux; not yet run on Apple hardware.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_dgemma.kernels import dispatch, registry
from mlx_dgemma.kernels.elementwise import fused
from mlx_dgemma.kernels.samples import dtype_named

SLICE = 16384  # columns per slice; part of the meaning of a sample, so the same on every backend
_LEAF = 512  # columns per partial sum inside a slice of the twin
ROW_BLOCK = 128  # rows that the twin takes at a time

Head = Callable[[int, int], mx.array]


class RowStatistics(NamedTuple):
    """What one pass learns of each of R rows."""

    entropy: mx.array  # [R] float32, nats; NaN where the row holds NaN or Inf
    argmax: mx.array  # [R] int32
    sample: mx.array  # [R] int32
    max: mx.array  # [R] float32: the largest tempered logit
    log_z: mx.array  # [R] float32: log of the sum of exp(tempered logits)


class Exponentials(NamedTuple):
    """A slice of each of R rows: e^(tempered logits - max) [R, n], and max and sum [R]; float32."""

    values: mx.array
    max: mx.array
    sum: mx.array


def row_statistics(
    raw_logits: mx.array,
    temperature: float | mx.array,
    uniforms: mx.array,
    *,
    softcap: float = 30.0,
    temp: float = 1.0,
) -> RowStatistics:
    """Statistics and one sample per row of raw logits [R, V], any float dtype.

    `temperature` is the schedule's T, a number or one per row [R]. `uniforms` [R, 2] float32 in
    [0, 1). `temp` divides the tempered logits for sampling only; 0 takes the argmax.
    """
    # A single row is a choice between few ids, of any number: each would be a shape of its own.
    several = raw_logits.shape[0] > 1
    run = twin
    if several and dispatch.use(OPERATION, raw_logits.dtype, *raw_logits.shape):
        run = metal
    return run(raw_logits, temperature, uniforms, softcap=softcap, temp=temp)


def twin(
    raw_logits: mx.array,
    temperature: float | mx.array,
    uniforms: mx.array,
    *,
    softcap: float = 30.0,
    temp: float = 1.0,
) -> RowStatistics:
    """The same in plain MLX operations; temporaries never exceed one slice of `ROW_BLOCK` rows."""
    rows, vocabulary = raw_logits.shape
    divisor = mx.broadcast_to(tempering(temperature, rows), (rows, 1))
    blocks: list[RowStatistics] = []
    for first in range(0, rows, ROW_BLOCK):
        some = slice(first, first + ROW_BLOCK)
        raw, now, drawn = raw_logits[some], divisor[some], uniforms[some]
        if blocks:  # one block at a time
            raw, now, drawn = mx.depends([raw, now, drawn], list(blocks[-1]))
        blocks.append(
            sliced_row_statistics(
                partial(_columns, raw),
                raw.shape[0],
                vocabulary,
                now,
                drawn,
                softcap=softcap,
                temp=temp,
            )
        )
    if len(blocks) == 1:
        return blocks[0]
    return RowStatistics(*(mx.concatenate(list(field)) for field in zip(*blocks, strict=True)))


def _columns(raw: mx.array, start: int, stop: int) -> mx.array:
    return raw[:, start:stop]


def sliced_row_statistics(
    head: Head,
    rows: int,
    vocabulary: int,
    temperature: float | mx.array,
    uniforms: mx.array,
    *,
    softcap: float = 30.0,
    temp: float = 1.0,
    kept: list[Exponentials] | None = None,
) -> RowStatistics:
    """Row statistics that never hold [rows, vocabulary].

    `head(start, stop)` gives the raw logits [rows, stop - start] of one vocabulary slice; it is
    called once per slice of `SLICE` columns, in order, and each slice is done before the next is
    made. Each slice's exponentials are appended to `kept` where that is given.
    """
    divisor = tempering(temperature, rows)
    parts: list[SliceStatistics] = []
    for start in range(0, vocabulary, SLICE):
        raw = head(start, min(start + SLICE, vocabulary))
        if parts:  # one slice in memory at a time, without asking the host to wait
            raw, _ = mx.depends([raw, divisor], list(parts[-1]))
        part, exponentials = slice_statistics(raw, divisor, uniforms[:, 1], start, softcap, temp)
        parts.append(part)
        if kept is not None:
            kept.append(Exponentials(exponentials, part.max, part.z))
    return merge_slices(parts, uniforms[:, 0], temp)


def tempering(temperature: float | mx.array, rows: int) -> mx.array:
    """The schedule's temperature as a column [rows or 1, 1] float32."""
    column = mx.array(temperature, dtype=mx.float32).reshape(-1, 1)
    if column.shape[0] not in (1, rows):
        raise ValueError(f"temperature has {column.shape[0]} values for {rows} rows")
    return column


def temper(raw: mx.array, softcap: mx.array, divisor: mx.array) -> mx.array:
    """softcap * tanh(raw / softcap) / T, elementwise in float32; NaN where raw is NaN or Inf."""
    x = raw.astype(mx.float32)
    return softcapped(x, softcap) / divisor + (x - x)


tempered = fused(temper)


def softcapped(x: mx.array, softcap: float | mx.array) -> mx.array:
    """softcap * tanh(x / softcap), elementwise in float32, so that none passes the softcap."""
    return softcap * mx.tanh(x / softcap)


@fused
def _exponentials(values: mx.array, maximum: mx.array) -> tuple[mx.array, mx.array]:
    """e^(values - maximum), and the same times (values - maximum)."""
    shifted = values - maximum
    exponentials = mx.exp(shifted)
    return exponentials, exponentials * shifted


class SliceStatistics(NamedTuple):
    """One slice of every row: [R] each, `weight` in the sampling distribution's own scale."""

    max: mx.array
    z: mx.array
    s: mx.array
    argmax: mx.array
    weight: mx.array
    candidate: mx.array


def slice_statistics(
    raw: mx.array, divisor: mx.array, uniform: mx.array, start: int, softcap: float, temp: float
) -> tuple[SliceStatistics, mx.array]:
    """The slice's share of the statistics, and its exponentials [R, n]."""
    values = tempered(raw, mx.array(softcap, dtype=mx.float32), divisor)
    maximum = values.max(axis=1, keepdims=True)
    argmax = values.argmax(axis=1).astype(mx.int32) + start
    exponentials, products = _exponentials(values, maximum)
    leaves = _leaf_sums(exponentials)
    z = leaves.sum(axis=1)
    s = _leaf_sums(products).sum(axis=1)
    if temp == 0:
        return SliceStatistics(maximum[:, 0], z, s, argmax, z, argmax), exponentials
    weight, sampled = z, exponentials
    if temp != 1:
        sampled = mx.exp((values - maximum) / temp)
        leaves = _leaf_sums(sampled)
        weight = leaves.sum(axis=1)
    candidate = _inverse_cdf(sampled, leaves, uniform) + start
    return SliceStatistics(maximum[:, 0], z, s, argmax, weight, candidate), exponentials


def _leaf_sums(values: mx.array) -> mx.array:
    """Sums over `_LEAF` columns at a time, [R, leaves]; the last leaf may be short."""
    rows, columns = values.shape
    whole = columns // _LEAF * _LEAF
    sums = []
    if whole:
        sums.append(values[:, :whole].reshape(rows, -1, _LEAF).sum(axis=2))
    if whole < columns:
        sums.append(values[:, whole:].sum(axis=1, keepdims=True))
    return mx.concatenate(sums, axis=1) if len(sums) > 1 else sums[0]


def _inverse_cdf(values: mx.array, leaves: mx.array, uniform: mx.array) -> mx.array:
    """Column drawn with probability proportional to `values`, first by leaf, then inside it."""
    leaf, remainder = pick(leaves, uniform * leaves.sum(axis=1))
    columns = mx.minimum(leaf[:, None] * _LEAF + mx.arange(_LEAF), values.shape[1] - 1)
    inside = mx.take_along_axis(values, columns, axis=1)
    inside = mx.where(leaf[:, None] * _LEAF + mx.arange(_LEAF) < values.shape[1], inside, 0.0)
    column, _ = pick(inside, remainder)
    return (leaf * _LEAF + column).astype(mx.int32)


def pick(weights: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """The first position whose running sum passes `target`, and what of the target is left there.

    weights: float32 [R, n]; target: float32 [R]. Returns int32 [R] and float32 [R].

    Rounding can put the target at or past the total; then the last position of weight above zero
    is taken, never one that was impossible.
    """
    running = mx.cumsum(weights, axis=1)
    passed = (running <= target[:, None]).sum(axis=1)
    last = (running < running[:, -1:]).sum(axis=1)
    position = mx.minimum(passed, last)
    before = mx.maximum(position - 1, 0)[:, None]
    before_it = mx.where(position > 0, mx.take_along_axis(running, before, axis=1)[:, 0], 0.0)
    return position.astype(mx.int32), mx.maximum(target - before_it, 0.0)


def merge_slices(parts: list[SliceStatistics], uniform: mx.array, temp: float) -> RowStatistics:
    stacked = SliceStatistics(
        *(mx.stack(list(field), axis=1) for field in zip(*parts, strict=True))
    )
    maximum = stacked.max.max(axis=1, keepdims=True)
    lower = stacked.max - maximum
    scale = mx.exp(lower)
    z = (scale * stacked.z).sum(axis=1)
    s = (scale * (stacked.s + stacked.z * lower)).sum(axis=1)
    log_sum = mx.log(z)
    best = stacked.max.argmax(axis=1, keepdims=True)
    argmax = mx.take_along_axis(stacked.argmax, best, axis=1)[:, 0]
    if temp == 0:
        sample = argmax
    else:
        weights = stacked.weight * (scale if temp == 1 else mx.exp(lower / temp))
        chosen, _ = pick(weights, uniform * weights.sum(axis=1))
        sample = mx.take_along_axis(stacked.candidate, chosen[:, None], axis=1)[:, 0]
    return RowStatistics(log_sum - s / z, argmax, sample, maximum[:, 0], maximum[:, 0] + log_sum)


_THREADS = 256
_KERNEL = registry.Kernel(
    "row_statistics",
    inputs=("logits", "temperature", "uniforms", "settings"),
    outputs=("entropy", "argmax", "sample", "maximum", "log_z"),
)


def _supports(shape: registry.Shape) -> bool:
    return registry.is_float(shape) and 0 < int(shape["vocabulary"]) <= 32 * SLICE


def metal(
    raw_logits: mx.array,
    temperature: float | mx.array,
    uniforms: mx.array,
    *,
    softcap: float = 30.0,
    temp: float = 1.0,
) -> RowStatistics:
    """The same as one Metal kernel, a threadgroup per row."""
    rows, vocabulary = raw_logits.shape
    divisors = mx.broadcast_to(tempering(temperature, rows)[:, 0], (rows,))
    outputs = registry.launch(
        _KERNEL,
        [raw_logits, divisors, uniforms, mx.array([softcap, temp], dtype=mx.float32)],
        template=[
            ("T", raw_logits.dtype),
            ("TG", _THREADS),
            ("NS", -(-vocabulary // SLICE)),
            ("SLICE", SLICE),
            ("SAMPLING", 0 if temp == 0 else 1 if temp == 1 else 2),
        ],
        grid=(_THREADS, rows, 1),
        threadgroup=(_THREADS, 1, 1),
        outputs=[
            ((rows,), mx.float32),
            ((rows,), mx.int32),
            ((rows,), mx.int32),
            ((rows,), mx.float32),
            ((rows,), mx.float32),
        ],
    )
    return RowStatistics(*outputs)


def _probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    """Small rows, then some of the whole vocabulary with every way to sample."""
    dtype, vocabulary = dtype_named(shape["dtype"]), int(shape["vocabulary"])
    rows = int(shape["rows"])
    sizes = [(3, 77), (2, 3 * SLICE + 5), (1, vocabulary)]
    cases = [(*size, temp) for size in sizes for temp in (0.0, 2.0, 1.0)]
    for some, columns, temp in [*cases, (rows, vocabulary, 1.0)]:
        key = mx.random.key(columns)
        raw = mx.random.normal((some, columns), key=key)
        # half the mass in one column, and at a higher temperature next to nothing of it
        raw[:, columns // 2] = 8.5
        raw = raw.astype(dtype)
        low, mid, high = (
            mx.stack([0.25 + 0.38 * (mx.arange(some) % 2), mx.full((some,), u)], axis=1)
            for u in (0.52, 0.5201, 0.5202)
        )
        first, last = (twin(raw, 0.7, drawn, temp=temp).sample for drawn in (low, high))
        mx.eval(first, last)  # else they would be timed with the kernel and with its twin
        yield registry.Probe(
            metal=partial(_compared, metal, raw, mid, first, last, temp),
            twin=partial(_compared, twin, raw, mid, first, last, temp),
            tolerance=1e-4,
        )


def _compared(
    run: Callable[..., RowStatistics],
    raw: mx.array,
    uniforms: mx.array,
    first: mx.array,
    last: mx.array,
    temp: float,
) -> list[mx.array]:
    """All but the sample, and whether that lies where a uniform a little off would put it."""
    stats = run(raw, 0.7, uniforms, temp=temp)
    inside = mx.logical_and(stats.sample >= first, stats.sample <= last).astype(mx.int32)
    return [stats.entropy, stats.argmax, stats.max, stats.log_z, inside]


OPERATION = registry.Operation(
    "row_statistics", ("dtype", "rows", "vocabulary"), (_KERNEL,), _supports, _probes
)
