"""The numbers: read a slice, cast, check, quantize, append; never more than a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.convert.plan import Plan, Step
from mlx_dgemma.convert.shards import Shard, ShardWriter
from mlx_dgemma.convert.source import Source, Tensor, packed_rows, slices
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.packing import Quantization

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}

# The bits of Inf: a value whose bits without the sign reach it is Inf or NaN.
_INFINITY_BITS = {
    mx.bfloat16: (mx.uint16, np.uint16(0x7FFF), 0x7F80),
    mx.float16: (mx.uint16, np.uint16(0x7FFF), 0x7C00),
    mx.float32: (mx.uint32, np.uint32(0x7FFFFFFF), 0x7F800000),
}


def is_finite(array: mx.array) -> bool:
    """True when no value of a floating-point array is NaN or Inf (by its bits, in one pass)."""
    if array.size == 0:
        return True
    unsigned, mask, infinity = _INFINITY_BITS[array.dtype]
    bits = (
        np.array(array.view(unsigned), copy=False)
        if array.ndim
        else np.array(array[None].view(unsigned))
    )
    return int((bits & mask).max()) < infinity


def quantize(rows: mx.array, step: Step) -> list[mx.array]:
    """Rows [n, ..., columns] as weight (uint32), scales and, for affine, biases; the rows alone
    without quantization."""
    if step.precision is None:
        return [rows]
    precision = step.precision
    return list(
        mx.quantize(
            rows,
            group_size=precision.group_size,
            bits=precision.bits,
            mode=precision.mode,
        )
    )


def _as_stored(
    tensor: Tensor, step: Step, start: int, stop: int, dtype: str
) -> list[mx.array] | None:
    """What `quantize` would give, where the source holds just that: quantizing it again would
    round it again."""
    wanted = step.precision
    if wanted is None:
        return None
    packing = Quantization(wanted.group_size, wanted.bits, wanted.mode)
    pieces = packed_rows(tensor, packing, start, stop)
    if pieces is None:
        return None
    floats = [piece for piece in pieces[1:] if piece.dtype not in (mx.uint8, mx.uint32)]
    same = all(piece.dtype == DTYPES[dtype] for piece in floats)
    if not same:
        return None
    mx.eval(pieces)
    if not all(map(is_finite, floats)):
        raise CheckpointError(f"{step.name} holds NaN or Inf; the source is damaged.")
    return pieces


def cast_rows(name: str, tensor: Tensor, start: int, stop: int, dtype: str) -> mx.array:
    """Rows in the target dtype, evaluated and known to be finite.

    Raises CheckpointError that names the tensor and says whether the source or the cast is to
    blame.
    """
    source = tensor.rows(start, stop)
    rows = source.astype(DTYPES[dtype])
    mx.eval(rows)
    if not is_finite(rows):
        mx.eval(source)
        if is_finite(source):
            raise CheckpointError(
                f"{name} holds values beyond the range of {dtype}; use --dtype bfloat16."
            )
        raise CheckpointError(f"{name} holds NaN or Inf; the source is damaged.")
    return rows


def write_shards(
    plan: Plan,
    source: Source,
    parameters: Mapping[str, Tensor],
    folder: Path,
    finished: Mapping[str, Any],
    on_shard: Callable[[Shard, dict[str, Any]], None],
    on_bytes: Callable[[int], None],
) -> None:
    """Write every shard of the plan that is not in `finished`, in order.

    on_shard(shard, record): called when a shard is whole on disk.
    on_bytes(n): called after n more bytes of the source were dealt with.
    """
    place = {output.name: shard for shard in plan.shards for output in shard.outputs}
    last = {shard.outputs[-1].name: shard for shard in plan.shards}
    metadata = {"format": "mlx" if plan.layout == "mlx" else "pt"}
    writers: dict[str, ShardWriter] = {}
    try:
        for step in plan.steps:
            tensor = parameters[step.name]
            wanted = [place[output.name].filename not in finished for output in step.outputs]
            if any(wanted):
                for output, wants in zip(step.outputs, wanted, strict=True):
                    filename = place[output.name].filename
                    if wants and filename not in writers:
                        writers[filename] = ShardWriter(folder, place[output.name], metadata)
                _write_step(plan, step, tensor, wanted, place, writers, on_bytes)
                mx.clear_cache()
            else:
                on_bytes(tensor.nbytes)
            for output in step.outputs:
                shard = last.get(output.name)
                if shard is not None and shard.filename in writers:
                    on_shard(shard, writers.pop(shard.filename).finish())
    finally:
        for writer in writers.values():
            writer.abandon()


def _write_step(
    plan: Plan,
    step: Step,
    tensor: Tensor,
    wanted: list[bool],
    place: Mapping[str, Shard],
    writers: Mapping[str, ShardWriter],
    on_bytes: Callable[[int], None],
) -> None:
    """One parameter: its weight streams out, its scales and biases follow when it is whole."""
    held: list[list[mx.array]] = [[] for _ in step.outputs]
    parts = list(slices(step.shape))
    reported = 0
    for number, (start, stop) in enumerate(parts, 1):
        pieces = _as_stored(tensor, step, start, stop, plan.dtype)
        if pieces is None:
            pieces = quantize(cast_rows(step.name, tensor, start, stop, plan.dtype), step)
        mx.eval(*pieces)
        for index, piece in enumerate(pieces):
            if not wanted[index]:
                continue
            name = step.outputs[index].name
            if index == 0:
                writers[place[name].filename].append(name, piece)
            else:
                held[index].append(piece)
        del pieces
        done = tensor.nbytes * number // len(parts)
        on_bytes(done - reported)
        reported = done
    for index, pieces in enumerate(held):
        for piece in pieces:
            name = step.outputs[index].name
            writers[place[name].filename].append(name, piece)
