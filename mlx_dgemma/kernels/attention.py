"""Attention over key segments, chunk by chunk, merged online; for head_dim 512 and long contexts,
which MLX does not fuse.

Keys come in segments: the context's cached prefix, one for every canvas of a batch, and the
canvas's own keys. Nothing is concatenated, and a packed prefix is dequantized a chunk at a time.
Without a mask every query sees every key it is given; a sliding window is a slice of the keys. The
query heads that share a key head are folded into rows, and so is the batch where a segment is
shared, so that keys are read once and each product is one matrix multiplication over `chunk` keys.

A chunk's weights are divided by their own sum before they meet the values, so that the product
stays within the values' range in any dtype. Softmax and the accumulated output are float32.

Metal kernels: checked by emulation on Linux; not yet run on Apple hardware.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_dgemma.kernels import dispatch, registry
from mlx_dgemma.kernels.samples import dtype_named

CHUNK = 2048  # keys per product
_LONGEST = 4096  # keys per product that the kernel takes
_LOWEST = -3e38  # below every score and, unlike -Inf, safe to subtract

Pair = tuple[mx.array, mx.array]


class Stored(Protocol):
    """Keys and values that are made when they are read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the keys, as of the values: [1, kv heads, S, head_dim]."""

    def read(self, start: int, stop: int, dtype: mx.Dtype, after: mx.array | None) -> Pair:
        """Keys and values [1, kv_heads, stop - start, D], not before `after` is computed."""


Segment = Pair | Stored


def count_keys(segment: Segment) -> int:
    return _shape_of(segment)[2]


class _Part(NamedTuple):
    """Attention over some keys: float32 [B, heads, L, 1], [B, heads, L, 1], [B, heads, L, D]."""

    maximum: mx.array
    total: mx.array
    output: mx.array  # times `total`


def attend(
    queries: mx.array,
    segments: Sequence[Segment],
    *,
    scale: float = 1.0,
    chunk: int = CHUNK,
    mask: mx.array | None = None,
) -> mx.array:
    """Attention output [B, heads, L, head_dim] over all keys of all segments.

    `queries` [B, heads, L, head_dim]; a segment is (keys, values) [B or 1, kv heads, S, head_dim],
    or makes them when it is read. `mask` bool [L, M] is of the last M keys, and all before them are
    visible; every query must see some key.
    """
    _, heads, length, head_dim = queries.shape
    kv_heads = _shape_of(segments[0])[1]
    sizes = (queries.dtype, length, heads, kv_heads, head_dim, chunk)
    run = metal if dispatch.use(OPERATION, *sizes) else twin
    return run(queries, segments, scale=scale, chunk=chunk, mask=mask)


def twin(
    queries: mx.array,
    segments: Sequence[Segment],
    *,
    scale: float = 1.0,
    chunk: int = CHUNK,
    mask: mx.array | None = None,
) -> mx.array:
    """The same in plain MLX operations: two products and an online merge per chunk of keys."""
    shape = queries.shape[:3]
    merged: _Part | None = None
    for chunk_of in _chunks(queries, segments, scale, chunk, mask):
        keys, values = chunk_of.read(queries.dtype, None if merged is None else merged.output)
        visible = chunk_of.visible
        scores = (chunk_of.folded @ keys.swapaxes(2, 3)).astype(mx.float32)
        if visible is not None:
            seen = mx.tile(visible, (scores.shape[2] // visible.shape[0], 1))
            scores = mx.where(seen, scores, _LOWEST)
        maximum = scores.max(axis=-1, keepdims=True)
        weights = mx.exp(scores - maximum)
        if visible is not None:
            weights = mx.where(seen, weights, 0.0)
        total = weights.sum(axis=-1, keepdims=True)
        weights = (weights / mx.maximum(total, 1e-30)).astype(values.dtype)
        output = (weights @ values).astype(mx.float32) * total
        shared = keys.shape[0] < shape[0]
        part = _Part(*(unfold(rows, shape, shared) for rows in (maximum, total, output)))
        merged = part if merged is None else _merge(merged, part)
    assert merged is not None
    return (merged.output / merged.total).astype(queries.dtype)


class _Chunk(NamedTuple):
    """Some keys of a segment, the queries folded for them, and what of the mask is theirs."""

    segment: Segment
    start: int
    stop: int
    folded: mx.array
    visible: mx.array | None

    def read(self, dtype: mx.Dtype, after: mx.array | None) -> Pair:
        """after: the result of the chunk before, so that never two chunks' scores are held."""
        if not isinstance(self.segment, tuple):
            return self.segment.read(self.start, self.stop, dtype, after)
        pair = [array[:, :, self.start : self.stop] for array in self.segment]
        keys, values = pair if after is None else mx.depends(pair, [after])
        return keys, values


def _chunks(
    queries: mx.array,
    segments: Sequence[Segment],
    scale: float,
    chunk: int,
    mask: mx.array | None,
) -> Iterator[_Chunk]:
    all_keys, first = sum(map(count_keys, segments)), 0
    for segment in segments:
        folded = fold(queries * scale if scale != 1.0 else queries, _shape_of(segment))
        for start in range(0, count_keys(segment), chunk):
            stop = min(start + chunk, count_keys(segment))
            visible = None if mask is None else _part_of(mask, first - all_keys, stop - start)
            yield _Chunk(segment, start, stop, folded, visible)
            first += stop - start


def _part_of(mask: mx.array, first: int, count: int) -> mx.array | None:
    """bool [L, count] for the keys from `first`, counted from the end; None if all are visible."""
    queries, masked = mask.shape
    start = masked + first
    if start + count <= 0:
        return None
    part = mask[:, max(start, 0) : start + count]
    if start >= 0:
        return part
    return mx.concatenate([mx.ones((queries, -start), dtype=mx.bool_), part], axis=1)


def _shape_of(segment: Segment) -> tuple[int, ...]:
    return segment[0].shape if isinstance(segment, tuple) else segment.shape


def fold(queries: mx.array, keys: tuple[int, ...]) -> mx.array:
    """Queries [B, heads, L, D] with those that share a key head in one matrix.

    keys: the shape [B or 1, kv heads, S, D] of the keys. The result is [B, kv heads, group * L, D],
    or [1, kv heads, B * group * L, D] where the batch shares its keys.
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads = keys[1]
    folded = queries.reshape(batch, kv_heads, (heads // kv_heads) * length, head_dim)
    if keys[0] < batch:
        folded = folded.swapaxes(0, 1).reshape(1, kv_heads, -1, head_dim)
    return folded


def unfold(rows: mx.array, shape: tuple[int, ...], shared: bool) -> mx.array:
    """Undoes `fold` for rows [.., kv heads, rows, D] of queries [B, heads, L]: [B, heads, L, D]."""
    batch, heads, length = shape
    if shared:
        kv_heads = rows.shape[1]
        rows = rows.reshape(kv_heads, batch, -1, rows.shape[-1]).swapaxes(0, 1)
    return rows.reshape(batch, heads, length, -1)


def _merge(one: _Part, two: _Part) -> _Part:
    maximum = mx.maximum(one.maximum, two.maximum)
    left, right = mx.exp(one.maximum - maximum), mx.exp(two.maximum - maximum)
    return _Part(
        maximum,
        one.total * left + two.total * right,
        one.output * left + two.output * right,
    )


_THREADS = 256
_SOFTMAX = registry.Kernel(
    "chunk_softmax", inputs=("scores", "mask", "queries"), outputs=("weights", "maximum", "total")
)
_MERGE = registry.Kernel(
    "merge_attention",
    inputs=("maximum", "total", "output", "chunk_maximum", "chunk_total", "chunk_output", "dims"),
    outputs=("new_maximum", "new_total", "new_output"),
)


def _supports(shape: registry.Shape) -> bool:
    some = int(shape["length"]) > 0 and int(shape["head_dim"]) > 0
    return registry.is_float(shape) and some and 0 < int(shape["chunk"]) <= _LONGEST


def metal(
    queries: mx.array,
    segments: Sequence[Segment],
    *,
    scale: float = 1.0,
    chunk: int = CHUNK,
    mask: mx.array | None = None,
) -> mx.array:
    """The same with everything between MLX's two products as two Metal kernels."""
    batch, heads, length, head_dim = queries.shape
    rows = batch * heads * length
    maximum = mx.full((rows,), _LOWEST, dtype=mx.float32)
    total, output = mx.zeros((rows,)), mx.zeros((rows, head_dim))
    for chunk_of in _chunks(queries, segments, scale, chunk, mask):
        keys, values = chunk_of.read(queries.dtype, output)
        scores = chunk_of.folded @ keys.swapaxes(2, 3)
        weights, local_maximum, local_total = _softmax(scores, chunk_of.visible, length, chunk)
        local = (weights @ values).reshape(rows, head_dim)
        kv_heads = keys.shape[1]
        maximum, total, output = registry.launch(
            _MERGE,
            [
                maximum,
                total,
                output,
                local_maximum,
                local_total,
                local,
                mx.array([batch, kv_heads, heads // kv_heads * length], dtype=mx.int32),
            ],
            template=[("T", local.dtype), ("SHARED", keys.shape[0] < batch)],
            grid=(head_dim, rows, 1),
            threadgroup=(min(head_dim, _THREADS), 1, 1),
            outputs=[
                ((rows,), mx.float32),
                ((rows,), mx.float32),
                ((rows, head_dim), mx.float32),
            ],
        )
    mixed = (output / total[:, None]).astype(queries.dtype)
    return mixed.reshape(queries.shape)


def _softmax(scores: mx.array, mask: mx.array | None, length: int, chunk: int) -> list[mx.array]:
    """Normalised weights like scores [.., rows, S], and per row the maximum and the sum.

    Threads hold `chunk` scores however many there are, so that a length has no text of its own.
    """
    count, every = scores.shape[-1], mx.array([length], dtype=mx.int32)
    rows = scores.size // count
    weights, maximum, total = registry.launch(
        _SOFTMAX,
        [
            scores.reshape(1, rows, count),
            every if mask is None else mask,
            every,
        ],
        template=[
            ("T", scores.dtype),
            ("TG", _THREADS),
            ("PER", -(-chunk // _THREADS)),
            ("HAS_MASK", mask is not None),
        ],
        grid=(_THREADS, rows, 1),
        threadgroup=(_THREADS, 1, 1),
        outputs=[
            ((1, rows, count), scores.dtype),
            ((rows,), mx.float32),
            ((rows,), mx.float32),
        ],
    )
    return [weights.reshape(scores.shape), maximum, total]


def _probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    """A mask that hides a whole chunk, a prefix that a batch shares, two chunks and a canvas."""
    dtype = dtype_named(shape["dtype"])
    heads, kv_heads = int(shape["heads"]), int(shape["kv_heads"])
    length, dim, whole = (int(shape[name]) for name in ("length", "head_dim", "chunk"))
    for batch, queries, counts, chunk in (
        (1, 3, (7,), 4),
        (2, 2, (5, 2), whole),
        (1, length, (2 * whole + length,), whole),
    ):
        keys = iter(mx.random.split(mx.random.key(queries), 1 + 2 * len(counts)))
        drawn = mx.random.normal((batch, heads, queries, dim), key=next(keys)) * dim**-0.5
        q, segments, wide = drawn.astype(dtype), list[Segment](), list[Segment]()
        for number, count in enumerate(counts):
            sides = (1 if number == 0 else batch, kv_heads, count, dim)
            k, v = (mx.random.normal(sides, key=next(keys)).astype(dtype) for _ in range(2))
            segments.append((k, v))
            wide.append((k.astype(mx.float32), v.astype(mx.float32)))
        mask = None
        if chunk < whole:  # the first query sees nothing of the last chunk
            mask = mx.arange(7)[None, :] <= mx.arange(queries)[:, None] + 3
        yield registry.Probe(
            partial(metal, q, segments, chunk=chunk, mask=mask),
            partial(twin, q, segments, chunk=chunk, mask=mask),
            tolerance=1e-4 if dtype == mx.float32 else 2e-2,
            expected=partial(twin, q.astype(mx.float32), wide, chunk=chunk, mask=mask),
        )


OPERATION = registry.Operation(
    "attention",
    ("dtype", "length", "heads", "kv_heads", "head_dim", "chunk"),
    (_SOFTMAX, _MERGE),
    _supports,
    _probes,
)
