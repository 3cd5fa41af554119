"""Writes safetensors shards as a stream: the plan fixes every byte before the first tensor.

Shapes and dtypes of the output follow from the source's shapes and the recipe, so each shard's
header can be written first and the numbers appended slice by slice. A shard appears under its
name only when whole, with its digest recorded in a journal; that is what a resumed conversion
trusts, after checking.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.errors import CheckpointError, ResourceError
from mlx_dgemma.files import open_regular
from mlx_dgemma.headers import DTYPES

# The shard size of the community's files: greedy, in module-tree order.
SHARD_BYTES = 5 << 30
# Smaller tensors are written last in their shard, so that large ones stay aligned to 8 bytes.
SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class Output:
    """One tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].nbytes * prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One output file and its tensors in the order in which they are produced."""

    filename: str
    outputs: tuple[Output, ...]

    def layout(self) -> list[Output]:
        """The tensors in the order of their bytes in the file."""
        return sorted(self.outputs, key=lambda output: output.nbytes < SMALL_BYTES)

    @property
    def data_bytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


def plan_shards(outputs: Iterable[Output], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Fill shards greedily in the given order; one shard is called model.safetensors."""
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if filled + output.nbytes > shard_bytes and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    ]


def index_of(shards: list[Shard]) -> dict[str, Any]:
    """The model.safetensors.index.json of these shards."""
    weight_map = {output.name: shard.filename for shard in shards for output in shard.outputs}
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }


def array_bytes(array: mx.array) -> memoryview:
    """The bytes of an evaluated array, without a copy where NumPy knows the dtype."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array, copy=False)).reshape(-1).view(np.uint8).data


class ShardWriter:
    """Appends one shard's tensors and hashes them on the way."""

    def __init__(self, folder: Path, shard: Shard, metadata: dict[str, str]) -> None:
        self.shard = shard
        self._final = folder / shard.filename
        self._partial = folder / f"{shard.filename}.tmp"
        self._digest = hashlib.sha256()
        self._small: dict[str, bytearray] = {}
        self._remaining = {output.name: output.nbytes for output in shard.outputs}
        self._order = [output.name for output in shard.layout()]
        self._is_small = {output.name: output.nbytes < SMALL_BYTES for output in shard.outputs}
        self._file = self._partial.open("wb")
        self.nbytes = 0
        self._write(self._header(metadata))

    def _header(self, metadata: dict[str, str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for output in self.shard.layout():
            header[output.name] = {
                "dtype": output.dtype,
                "shape": list(output.shape),
                "data_offsets": [offset, offset + output.nbytes],
            }
            offset += output.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise ResourceError(
                f"{self._partial}: writing failed ({error.strerror}); what is finished stays, "
                "run the same command again to go on."
            ) from error
        self._digest.update(data)
        self.nbytes += len(data)

    def append(self, name: str, array: mx.array) -> None:
        """The next rows [n, ...] of tensor `name`; large tensors must come in the planned order."""
        data = array_bytes(array)
        self._remaining[name] -= len(data)
        if self._remaining[name] < 0:
            raise AssertionError(f"{name}: more bytes than planned")
        if self._is_small[name]:
            self._small.setdefault(name, bytearray()).extend(data)
            return
        while self._order[0] != name:
            done = self._order.pop(0)
            if self._remaining[done]:
                raise AssertionError(f"{name} written before {done} is whole")
        self._write(data)

    def finish(self) -> dict[str, Any]:
        """Flush to disk, rename, and return the journal entry of this shard."""
        for output in self.shard.layout():
            if self._remaining[output.name]:
                raise AssertionError(f"{output.name}: {self._remaining[output.name]} bytes missing")
            if output.name in self._small:
                self._write(self._small[output.name])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._final)
        return {"bytes": self.nbytes, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file; CheckpointError when it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def write_json(path: Path, value: Any, indent: int = 4) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a half."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
