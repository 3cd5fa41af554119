"""The one reader of safetensors headers: what a file holds, checked before a byte of it is used.

The rules are the safetensors library's: names, dtypes and shapes as the format has them; byte
ranges that follow one another from the first byte of data to the file's last, without holes or
overlaps. That library keeps the byte ranges to itself, which slices and plans need.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import is_plain, open_regular, read_json
from mlx_dgemma.untrusted_json import Limits, UntrustedJSONError, parse, printable, shown

# A header of the real model is 200 kB, with every expert's tensors apart 2 MB.
LIMITS = Limits(size=16 << 20, depth=8)
# MLX counts a dimension in 32 bits.
_MOST_DIMENSION = 2**31 - 1
_MOST_DIMENSIONS = 8
METADATA = "__metadata__"
DOWNLOAD = "download it again"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Dtype:
    """A number's form in a file. name: MLX's, where it has one. numpy: how NumPy reads its bits
    (bfloat16 travels as uint16), None where the number cannot be computed with here."""

    nbytes: int
    name: str
    numpy: type[np.generic] | None


DTYPES = {
    "BF16": Dtype(2, "bfloat16", np.uint16),
    "F16": Dtype(2, "float16", np.float16),
    "F32": Dtype(4, "float32", np.float32),
    "U32": Dtype(4, "uint32", np.uint32),
    "U8": Dtype(1, "uint8", np.uint8),
    "I8": Dtype(1, "int8", np.int8),
    "I16": Dtype(2, "int16", np.int16),
    "U16": Dtype(2, "uint16", np.uint16),
    "I32": Dtype(4, "int32", np.int32),
    "I64": Dtype(8, "int64", np.int64),
    "U64": Dtype(8, "uint64", np.uint64),
    "F64": Dtype(8, "float64", None),
    "BOOL": Dtype(1, "bool", None),
    "C64": Dtype(8, "complex64", None),
    "F8_E4M3": Dtype(1, "float8_e4m3", None),
    "F8_E5M2": Dtype(1, "float8_e5m2", None),
    "F8_E8M0": Dtype(1, "float8_e8m0", None),
}
# MLX's name -> the format's, of what this program writes.
CODES = {dtype.name: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. start, end: byte offsets in the file at `path`."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    end: int
    path: Path

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def dtype(self) -> str:
        """MLX's name of the dtype."""
        return DTYPES[self.code].name


@dataclass(frozen=True)
class Header:
    """A whole file's header. raw: its JSON. identity: of the file, changes when it is written."""

    path: Path
    raw: bytes
    entries: dict[str, Entry]
    metadata: dict[str, str]
    identity: tuple[int, int, int]

    @property
    def file_bytes(self) -> int:
        return self.identity[1]


def identity_of(status: os.stat_result) -> tuple[int, int, int]:
    """Inode, size and time of the last write in nanoseconds."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_header(path: Path, advice: str = DOWNLOAD) -> Header:
    """The header of a safetensors file, checked against the file's size.

    advice: what to do about a file that is damaged.

    Raises CheckpointError for what cannot be read, is truncated, or breaks the format's rules.
    """
    try:
        with open_regular(path) as file:
            identity = identity_of(os.fstat(file.fileno()))
            size = identity[1]
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length < 2 or 8 + length > size:
                raise CheckpointError(f"{path} is truncated or no safetensors file; {advice}.")
            if length > LIMITS.size:
                raise _damaged(path, f"it is {length:,} bytes long", advice)
            raw = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {advice}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(raw) < length:
        raise CheckpointError(f"{path} is truncated; {advice}.")
    entries, metadata, end = parse_header(raw, path, advice)
    if size != end:
        state = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} is {state}: {size:,} of {end:,} bytes; {advice}.")
    return Header(path, raw, entries, metadata, identity)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index file; CheckpointError for anything else."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain(shard):
            raise CheckpointError(
                f"{index}: weight_map says that {printable(name)} is in {shown(shard)}, which is "
                "no file of its folder; download it again."
            )
    return weight_map


def parse_header(
    raw: bytes, path: Path, advice: str = DOWNLOAD
) -> tuple[dict[str, Entry], dict[str, str], int]:
    """(entries, metadata, the size the file must have) of a header's JSON; CheckpointError."""
    try:
        content = parse(raw, LIMITS)
    except UntrustedJSONError as error:
        raise _damaged(path, f"it {error}", advice) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it is no JSON object", advice)
    metadata = content.pop(METADATA, None) or {}
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not strings:
        raise _damaged(path, f"{METADATA} is not an object of strings", advice)
    base = 8 + len(raw)
    entries = {name: read_entry(name, item, base, path, advice) for name, item in content.items()}
    return entries, metadata, check_ranges(entries.values(), base, path, advice)


def check_ranges(entries: Iterable[Entry], base: int, path: Path, advice: str = DOWNLOAD) -> int:
    """The end of the last tensor, where the ranges follow one another from `base` on.

    Raises CheckpointError for a hole or an overlap.
    """
    end = base
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            fault = "overlaps another tensor" if entry.start < end else "lies after a hole"
            raise _damaged(path, f"{printable(entry.name)} {fault}", advice)
        end = entry.end
    return end


def read_entry(name: str, item: Any, base: int, path: Path, advice: str = DOWNLOAD) -> Entry:
    """One tensor's item of a header; CheckpointError unless it is as the format says.

    base: the file offset of the first byte of data.
    """
    called = printable(name)
    if not isinstance(item, Mapping):
        raise _damaged(path, f"{called} is {shown(item)}, not an object", advice)
    code: Any = item.get("dtype")
    shape: Any = item.get("shape")
    span: Any = item.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise _damaged(path, f"{called} has the dtype {shown(code)}, which is not known", advice)
    counts = isinstance(shape, list) and all(_is_count(n, _MOST_DIMENSION) for n in shape)
    if not counts or len(shape) > _MOST_DIMENSIONS:
        raise _damaged(path, f"{called} has the shape {shown(shape)}", advice)
    if not (isinstance(span, list) and len(span) == 2 and all(_is_count(n, 2**62) for n in span)):
        raise _damaged(path, f"{called} has the data_offsets {shown(span)}", advice)
    begin, end = span
    if end - begin != DTYPES[code].nbytes * prod(shape):
        raise _damaged(
            path,
            f"{called} has offsets that do not fit its shape: {code} {shape} in "
            f"{end - begin:,} bytes",
            advice,
        )
    return Entry(name, code, tuple(shape), base + begin, base + end, path)


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _damaged(path: Path, why: str, advice: str) -> CheckpointError:
    return CheckpointError(f"{path} has a damaged header: {why}; {advice}.")
