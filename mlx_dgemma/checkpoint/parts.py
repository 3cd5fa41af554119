"""A rank's part of a checkpoint: read without the rest, counted, and told from another checkpoint.

Rows are read where they lie in the file. Columns lie in every row, so a tensor that is cut by
columns is read through, an expert at a time, and its part kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.sources import Source
from mlx_dgemma.checkpoint.tensorfile import TensorFile
from mlx_dgemma.headers import Entry
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.names import named_tensors
from mlx_dgemma.model.network import Model
from mlx_dgemma.model.share import Part, Share

_SAMPLE = 64  # bytes at each of a tensor's places that tell checkpoints apart
_PLACES = 3


def own_parts(
    share: Share,
    config: ModelConfig,
    parameters: Mapping[str, mx.array],
    sources: Mapping[str, Source],
    headers: Mapping[str, Entry],
) -> dict[str, mx.array]:
    """What a rank holds of the named parameters, which are not computed yet; the parts of what is
    divided are read now."""
    files: dict[Path, TensorFile] = {}
    found = {}
    try:
        for name, whole in parameters.items():
            if not share.holds(name):
                continue
            part = share.part(config, name)
            if part is None:
                found[name] = whole
            elif sources[name].kind == "tensor":
                entry = headers[sources[name].parts[0]]
                if entry.path not in files:
                    files[entry.path] = TensorFile(entry.path)
                found[name] = read_part(files[entry.path], entry.name, part)
            else:  # experts one by one, or gate beside up: put together, then cut
                found[name] = cut(whole, part)
                mx.eval(found[name])
    finally:
        for file in files.values():
            file.close()
    return found


def cut(whole: mx.array, part: Part) -> mx.array:
    """A part of a tensor in memory, as an array of its own."""
    axis = whole.ndim - (2 if part.axis == "rows" else 1)
    pieces = [mx.take(whole, mx.arange(a, b), axis=axis) for a, b in part.stored(whole.shape[axis])]
    return mx.contiguous(mx.concatenate(pieces, axis=axis))


def read_part(file: TensorFile, name: str, part: Part) -> mx.array:
    """A part of a stored matrix [rows, columns], or of each of a stack [E, rows, columns]."""
    entry = file.entries[name]
    shape = entry.shape
    if len(shape) == 2:
        found = _matrix_part(file, name, part, shape, 0)
    else:
        experts, rows = shape[0], shape[1]
        found = np.stack(
            [_matrix_part(file, name, part, shape[1:], index * rows) for index in range(experts)]
        )
    array = mx.array(found)
    return array.view(mx.bfloat16) if entry.code == "BF16" else array


def _matrix_part(
    file: TensorFile, name: str, part: Part, shape: tuple[int, ...], first: int
) -> np.ndarray:
    """first: the matrix' first row, counted in all rows of the tensor."""
    rows, columns = shape
    if part.axis == "rows":
        pieces = [file.rows(name, first + a, first + b) for a, b in part.stored(rows)]
        return np.concatenate(pieces)
    whole = file.rows(name, first, first + rows)
    return np.concatenate([whole[:, a:b] for a, b in part.stored(columns)], axis=1)


def drop_absent(model: Model, parameters: Mapping[str, mx.array]) -> None:
    """Removes the modules of which this rank holds nothing, whose declared zeros would otherwise be
    computed."""
    decoder = model.model.decoder
    for name in ("self_conditioning", "norm"):
        if not any(known.startswith(f"model.decoder.{name}.") for known in parameters):
            decoder.pop(name)


def held_bytes(
    headers: Mapping[str, Entry], sources: Mapping[str, Source], config: ModelConfig, share: Share
) -> dict[str, int]:
    """Bytes that a rank holds, by parameter, as they are stored."""
    found = {}
    for name, source in sources.items():
        shape = source.shape(headers)
        if shape is None or not share.holds(name):
            continue
        part = share.part(config, name)
        whole = sum(headers[n].nbytes for n in source.names)
        own = shape if part is None else part.shape(shape)
        found[name] = whole * prod(own) // max(prod(shape), 1)
    return found


def identity(config_text: bytes, headers: Mapping[str, Entry]) -> str:
    """SHA-256 that tells one checkpoint from another: its config, and of every tensor name, form
    and some bytes."""
    digest = hashlib.sha256(config_text)
    files: dict[Path, int] = {}
    try:
        for name, entry in sorted(headers.items()):
            if entry.path not in files:
                files[entry.path] = os.open(entry.path, os.O_RDONLY)
            digest.update(f"{name} {entry.code} {entry.shape}".encode())
            for place in range(_PLACES):
                at = entry.start + entry.nbytes * place // _PLACES
                count = min(_SAMPLE, entry.end - at)
                digest.update(os.pread(files[entry.path], count, at))
    finally:
        for file in files.values():
            os.close(file)
    return digest.hexdigest()


def resident_bytes(model: Model) -> int:
    """Bytes of all text weights that a model holds."""
    tensors = named_tensors(model.model.decoder.parameters())
    return sum(tensor.nbytes for tensor in tensors.values())
