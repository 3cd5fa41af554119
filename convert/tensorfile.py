"""One safetensors file, read by its header and a memory map.

Knows nothing about models: names, dtypes, shapes and byte ranges only. A checkpoint's header
says where every tensor lies, so a slice of a 1 GB tensor costs the pages of that slice.
"""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.weights import STORED_DTYPES
from mlx_dgemma.errors import CheckpointError

# A header of the real model is about 200 kB; the format itself caps it at 100 MB.
MAX_HEADER_BYTES = 100_000_000

# NumPy has no bfloat16: its bits travel as uint16.
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}

MLX_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `end` are byte offsets from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def parse_header(raw: bytes, file: str, file_size: int) -> tuple[dict[str, Entry], dict]:
    """The tensors and the metadata of a header (without its 8-byte length).

    Raises CheckpointError for a header that is not JSON or whose ranges are wrong.
    """
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        entries = {}
        base = 8 + len(raw)
        for name, item in header.items():
            begin, end = item["data_offsets"]
            shape = tuple(int(n) for n in item["shape"])
            entries[name] = Entry(name, item["dtype"], shape, base + begin, base + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: the safetensors header is damaged; download the file again."
        ) from error
    for entry in entries.values():
        size, _ = STORED_DTYPES.get(entry.dtype, (None, None))
        if size is not None and entry.nbytes != size * prod(entry.shape):
            raise CheckpointError(
                f"{file}: {entry.name} is {entry.dtype} {list(entry.shape)} but spans "
                f"{entry.nbytes} bytes; download the file again."
            )
    end = max((entry.end for entry in entries.values()), default=base)
    if file_size != end:
        state = "truncated" if file_size < end else "longer than its header says"
        raise CheckpointError(
            f"{file}: {state} ({file_size:,} bytes, {end:,} expected); download the file again."
        )
    return entries, metadata


class TensorFile:
    """A memory-mapped safetensors file; slices are copied out, the map is never written."""

    _file: BinaryIO | None
    _map: mmap.mmap | None

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            self._file = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > self.size:
            self._file.close()
            raise CheckpointError(
                f"{path.name}: not a safetensors file or truncated within its header; "
                "download the file again."
            )
        self.header = self._file.read(length)
        self.entries, self.metadata = parse_header(self.header, path.name, self.size)
        self._map = None

    @classmethod
    def elsewhere(cls, name: str, entries: dict[str, Entry]) -> TensorFile:
        """A file of which only the header is here: its tensors have shapes and no rows."""
        file = cls.__new__(cls)
        file.path, file.entries, file.metadata = Path(name), entries, {}
        file.size, file.header = max((entry.end for entry in entries.values()), default=0), b""
        file._file = file._map = None
        return file

    def numpy(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor's first axis as a view of the map; bfloat16 as uint16.

        A scalar is returned whole. The view must not outlive `release()` of its pages' use.
        """
        entry = self.entries[name]
        if self._file is None:
            raise CheckpointError(f"{self.path.name}: only its header was read, not {name}.")
        if entry.dtype not in _NUMPY:
            raise CheckpointError(
                f"{self.path.name}: {name} is stored as {entry.dtype}; "
                "the converter reads F32, F16, BF16 and MLX's quantized tensors."
            )
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = entry.shape[0] if entry.shape else 1
        stop = rows if stop is None else stop
        row_items = prod(entry.shape[1:])
        dtype = np.dtype(_NUMPY[entry.dtype])
        offset = entry.start + start * row_items * dtype.itemsize
        flat = np.frombuffer(self._map, dtype, (stop - start) * row_items, offset)
        return flat.reshape((stop - start, *entry.shape[1:]) if entry.shape else ())

    def mlx(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """The same rows as an MLX array of the stored dtype."""
        array = mx.array(self.numpy(name, start, stop))
        return array.view(mx.bfloat16) if self.entries[name].dtype == "BF16" else array

    def release(self) -> None:
        """Give the pages read so far back to the system; later reads map them again."""
        if self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._file is not None:
            self._file.close()
