"""A full-attention layer's context in 8 bits: half the memory, and no longer exact.

Only what is committed is packed. A canvas, and a chunk of the prompt while it is read, attend to
their own keys and values as they are. The packed ones are dequantized a chunk at a time, where
attention reads them, so that working memory does not grow with the context.

Each position is packed by itself, in groups along the head, so its bits depend neither on how the
prompt was cut into chunks nor on what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.kernels.attention import Pair, Segment
from mlx_dgemma.model.layer_context import Arrays, LayerContext

# Packing keys costs more accuracy than packing values, since their error enters the scores, most
# where attention is peaked. But packing values alone would leave four fifths of the longest
# context, and the cost of keys is small (studies/README.md has both).
BITS = 8
GROUPS = (64, 32)
# Of scales and biases: bfloat16's would be coarse enough to add half the packing's own error.
STORED = mx.float16


def group_size(head_dim: int) -> int:
    """How many numbers share a scale; CheckpointError for a head that cannot be divided."""
    for size in GROUPS:
        if head_dim % size == 0:
            return size
    raise CheckpointError(
        f"kv_bits={BITS} needs heads of a multiple of {GROUPS[-1]} numbers in full-attention "
        f"layers, and this model's have {head_dim}; leave kv_bits out."
    )


def pack(rows: mx.array) -> Arrays:
    """[..., D] as codes uint32 [..., D / 4], scales and biases [..., D / group]."""
    size = group_size(rows.shape[-1])
    codes, scales, biases = mx.quantize(rows.astype(mx.float32), size, BITS)
    return codes, scales.astype(STORED), biases.astype(STORED)


def unpack(packed: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
    """[..., D] in `dtype`; dequantized in float32 where `dtype` is, else in float16."""
    codes, scales, biases = packed
    width = mx.float32 if dtype == mx.float32 else STORED
    size = codes.shape[-1] * (32 // BITS) // scales.shape[-1]
    rows = mx.dequantize(codes, scales.astype(width), biases.astype(width), size, BITS)
    return rows.astype(dtype)


@dataclass(frozen=True)
class PackedSegment:
    """Packed keys and values, three arrays each, as `kernels.attend` reads them."""

    arrays: Arrays

    @property
    def shape(self) -> tuple[int, ...]:
        codes = self.arrays[0]
        return (*codes.shape[:3], codes.shape[3] * (32 // BITS))

    def read(self, start: int, stop: int, dtype: mx.Dtype, after: mx.array | None) -> Pair:
        parts = [array[:, :, start:stop] for array in self.arrays]
        if after is not None:
            parts = mx.depends(parts, [after])
        return unpack(parts[:3], dtype), unpack(parts[3:], dtype)


class PackedLayerContext(LayerContext):
    """A full-attention layer's committed keys and values, packed."""

    parts: ClassVar[tuple[str, ...]] = (
        "keys.weight",
        "keys.scales",
        "keys.biases",
        "values.weight",
        "values.scales",
        "values.biases",
    )

    def __init__(self, room: int):
        super().__init__(None, room)

    def append(self, keys: mx.array, values: mx.array) -> list[Segment]:
        before = self.used
        self._write((*pack(keys), *pack(values)))
        self.used += keys.shape[2]
        # Read from the buffers as they are now: a holder of the old ones would make MLX copy them.
        return [*self._span(0, before), (keys, values)]

    def with_canvas(self, keys: mx.array, values: mx.array) -> list[Segment]:
        return [*self.visible(), (keys, values)]

    def _span(self, first: int, end: int) -> list[Segment]:
        if first == end:
            return []
        return [PackedSegment(tuple(buffer[:, :, first:end] for buffer in self.buffers))]
