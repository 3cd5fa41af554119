"""A checkpoint as a source: every parameter of the network by name, whatever the files look like.

The loader's rules say which stored tensors make up a parameter (experts stacked or apart, gate
and up joined or apart, packed or dense). Here each parameter becomes something whose rows can
be read slice by slice as floating point, without loading the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint import sources, weights
from mlx_dgemma.checkpoint.adapters import Adapter
from mlx_dgemma.checkpoint.tensorfile import TensorFile
from mlx_dgemma.convert.remote import local_files, read_headers
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import read_json
from mlx_dgemma.headers import Entry
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.names import is_tied_duplicate, tied_to
from mlx_dgemma.model.packing import Quantization, quantization_of
from mlx_dgemma.model.parameters import matrices, parameter_shapes

# What is held of one tensor at a time, counted in float32.
SLICE_BYTES = 64 << 20


class Tensor(Protocol):
    """One parameter: dense shape, and rows of its first axis as a floating-point array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def rows(self, start: int, stop: int) -> mx.array:
        """Rows [stop - start, ...] in the source's dtype, dequantized where it is packed."""
        ...


@dataclass(frozen=True)
class Dense:
    """Stored as it is."""

    file: TensorFile
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def rows(self, start: int, stop: int) -> mx.array:
        return self.file.mlx(self.entry.name, start, stop)


@dataclass(frozen=True)
class Packed:
    """Stored in MLX's quantized form; rows come back dequantized."""

    weight: Tensor
    scales: Tensor
    biases: Tensor | None
    packing: Quantization

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, words = self.weight.shape
        return (*rows, words * 32 // self.packing.bits)

    @property
    def nbytes(self) -> int:
        biases = 0 if self.biases is None else self.biases.nbytes
        return self.weight.nbytes + self.scales.nbytes + biases

    def rows(self, start: int, stop: int) -> mx.array:
        biases = None if self.biases is None else self.biases.rows(start, stop)
        return mx.dequantize(
            self.weight.rows(start, stop),
            self.scales.rows(start, stop),
            biases,
            group_size=self.packing.group_size,
            bits=self.packing.bits,
            mode=self.packing.mode,
        )


@dataclass(frozen=True)
class Stacked:
    """One tensor per expert; expert numbers are the first axis."""

    experts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.experts), *self.experts[0].shape)

    @property
    def nbytes(self) -> int:
        return sum(expert.nbytes for expert in self.experts)

    def rows(self, start: int, stop: int) -> mx.array:
        return mx.stack([expert.rows(0, expert.shape[0]) for expert in self.experts[start:stop]])


@dataclass(frozen=True)
class Joined:
    """Gate and up apart; gate comes first."""

    gate: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        experts, width, hidden = self.gate.shape
        return (experts, width + self.up.shape[1], hidden)

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.up.nbytes

    def rows(self, start: int, stop: int) -> mx.array:
        return mx.concatenate([self.gate.rows(start, stop), self.up.rows(start, stop)], axis=1)


@dataclass(frozen=True)
class Merged:
    """Another tensor as an adapter changes it."""

    tensor: Tensor
    name: str
    adapter: Adapter

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def rows(self, start: int, stop: int) -> mx.array:
        return self.adapter.merged(self.name, self.tensor.rows(start, stop), start)


def packing_of(tensor: Tensor) -> Quantization | None:
    """How a tensor is packed; None where it is dense."""
    match tensor:
        case Packed():
            return tensor.packing
        case Stacked():
            return packing_of(tensor.experts[0])
        case Joined():
            return packing_of(tensor.gate)
    return None


def packed_rows(
    tensor: Tensor, packing: Quantization, start: int, stop: int
) -> list[mx.array] | None:
    """Weight, scales and biases of rows [start, stop) as they are stored; None for a tensor that
    is not stored in this packing, or is changed by an adapter."""
    if isinstance(tensor, Packed) and tensor.packing == packing:
        parts = (tensor.weight, tensor.scales, tensor.biases)
        return [part.rows(start, stop) for part in parts if part is not None]
    if isinstance(tensor, Stacked):
        experts = [packed_rows(e, packing, 0, e.shape[0]) for e in tensor.experts[start:stop]]
        if all(expert is not None for expert in experts):
            return [mx.stack(list(parts)) for parts in zip(*experts, strict=True)]
    if isinstance(tensor, Joined):
        gate = packed_rows(tensor.gate, packing, start, stop)
        up = packed_rows(tensor.up, packing, start, stop)
        if gate is not None and up is not None:
            return [mx.concatenate(list(pair), axis=1) for pair in zip(gate, up, strict=True)]
    return None


@dataclass
class Source:
    """An opened checkpoint. Nothing but headers has been read.

    folder: holds the config.json, and the weights unless they are on the Hub (`describe_source`).
    """

    folder: Path
    raw_config: dict[str, Any]
    config: ModelConfig
    files: dict[str, TensorFile]
    tensors: dict[str, Tensor]
    duplicates: list[tuple[str, Tensor, str]] = field(default_factory=list)

    @property
    def quantized(self) -> bool:
        return any(isinstance(tensor, Packed) for tensor in self.tensors.values())

    def with_adapter(self, adapter: Adapter | None) -> dict[str, Tensor]:
        """The parameters, with those that an adapter changes merged or replaced."""
        if adapter is None:
            return self.tensors
        return {
            name: Merged(tensor, name, adapter) if adapter.changes(name) else tensor
            for name, tensor in self.tensors.items()
        }

    def check_unchanged(self) -> None:
        """Raises CheckpointError when a weight file or config.json is not what was read."""
        for file in self.files.values():
            file.check_unchanged()
        if read_json(self.folder / "config.json") != self.raw_config:
            raise CheckpointError(
                f"{self.folder / 'config.json'} changed while it was read; run the command again."
            )

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(folder: Path) -> Source:
    """Read the config and every header of a checkpoint folder, and check them against each other.

    Raises ModelNotFoundError or CheckpointError; everything wrong with the names and shapes is
    in one message.
    """
    config = ModelConfig.from_folder(folder)
    return _source(folder, config, local_files(folder), str(folder))


def describe_source(repository: str, revision: str | None) -> Source:
    """`open_source` of a Hub repository by its headers alone: shapes, and no rows to read."""
    return _source(*read_headers(repository, revision), repository)


def _source(folder: Path, config: ModelConfig, files: dict[str, TensorFile], name: str) -> Source:
    headers = {tensor: entry for file in files.values() for tensor, entry in file.entries.items()}
    try:
        matched = weights.match(config, headers, name)
        stored, duplicates = _gather(files)
        tensors = _parameters(config, matched, stored)
    except BaseException:
        for file in files.values():
            file.close()
        raise
    for tied, dense in stored.items():
        original = tied_to(tied) if is_tied_duplicate(tied) else tied
        original += ".weight" if f"{original}.weight" in tensors else ""
        if is_tied_duplicate(tied) and original in tensors:
            duplicates.append((tied, dense, original))
    raw_config = read_json(folder / "config.json")
    return Source(folder, raw_config, config, files, tensors, duplicates)


def _gather(
    files: Mapping[str, TensorFile],
) -> tuple[dict[str, Dense], list[tuple[str, Tensor, str]]]:
    """All tensors of all files; the same name in two files is kept once and compared later."""
    stored: dict[str, Dense] = {}
    copies: list[tuple[str, Tensor, str]] = []
    for file in files.values():
        for name, entry in file.entries.items():
            if name in stored:
                copies.append((f"{name} in {file.path.name}", Dense(file, entry), name))
            else:
                stored[name] = Dense(file, entry)
    return stored, copies


def _parameters(
    config: ModelConfig, matched: Mapping[str, sources.Source], stored: Mapping[str, Dense]
) -> dict[str, Tensor]:
    """Dense parameter name -> tensor; a packed module's tensors become one."""
    parameters: dict[str, Tensor] = {}
    for name in dense_shapes(config):
        tensor = _assemble(matched[name], stored)
        module = name.removesuffix(".weight")
        if f"{module}.scales" in matched:
            packing = quantization_of(config.quantization, module)
            if packing is None:
                raise CheckpointError(
                    f"{module} is quantized but config.json's quantization does not say how."
                )
            scales = _assemble(matched[f"{module}.scales"], stored)
            biases = matched.get(f"{module}.biases")
            packed = None if biases is None else _assemble(biases, stored)
            tensor = Packed(tensor, scales, packed, packing)
        parameters[name] = tensor
    return parameters


def _assemble(source: sources.Source, stored: Mapping[str, Dense]) -> Tensor:
    if source.kind == "tensor":
        return stored[source.parts[0]]
    parts = tuple(_assemble(part, stored) for part in source.parts)
    return Stacked(parts) if source.kind == "stack" else Joined(*parts)


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape without quantization, in module-tree order."""
    dense = {f"{module}.weight": shape for module, shape in matrices(config).items()}
    table: dict[str, tuple[int, ...]] = {}
    for name, (shape, _) in parameter_shapes(config, "mlx", scaled=()).items():
        table[name] = dense.get(name, shape)
    return table


def slices(shape: tuple[int, ...], limit: int = SLICE_BYTES) -> Iterator[tuple[int, int]]:
    """(start, stop) along the first axis, each at most `limit` bytes of float32 where it can be."""
    count = shape[0] if shape else 1
    rows = max(1, limit // (4 * max(1, prod(shape[1:]))))
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


def compare_duplicates(source: Source) -> None:
    """Refuse a checkpoint whose tied duplicates hold other numbers than the tensor they copy."""
    for name, copy, original in source.duplicates:
        other = source.tensors.get(original)
        if other is None or copy.shape != other.shape:
            shape = "nothing" if other is None else str(list(other.shape))
            raise CheckpointError(f"{name} is {list(copy.shape)} but {original} is {shape}.")
        for start, stop in slices(copy.shape):
            ours = np.array(copy.rows(start, stop).astype(mx.float32))
            theirs = np.array(other.rows(start, stop).astype(mx.float32))
            if not np.array_equal(ours, theirs, equal_nan=True):
                raise CheckpointError(
                    f"{name} and {original} are one tied weight but hold different numbers; "
                    "this checkpoint was saved wrongly."
                )
