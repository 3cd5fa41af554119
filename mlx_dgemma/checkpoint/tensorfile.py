"""One safetensors file: its header, and rows of its tensors as arrays.

Knows nothing about models: names, dtypes, shapes and byte ranges only. Rows are read, not mapped:
a file that is cut short or unplugged meanwhile gives an error, where a memory map would end the
process. What has been read leaves no page behind in this process.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import open_regular
from mlx_dgemma.headers import DOWNLOAD, DTYPES, Entry, identity_of, read_header


class TensorFile:
    """An opened safetensors file."""

    def __init__(self, path: Path, advice: str = DOWNLOAD) -> None:
        """advice: what to do about a file that is damaged. Raises CheckpointError."""
        read = read_header(path, advice)
        self.path = path
        self.entries, self.metadata, self.header = read.entries, read.metadata, read.raw
        self.size, self._identity = read.file_bytes, read.identity
        try:
            self._file: BinaryIO | None = open_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error

    @classmethod
    def elsewhere(cls, name: str, entries: dict[str, Entry]) -> TensorFile:
        """A file of which only the header is here: its tensors have shapes and no rows."""
        file = cls.__new__(cls)
        file.path, file.entries, file.metadata = Path(name), entries, {}
        file.size, file.header = max((entry.end for entry in entries.values()), default=0), b""
        file._file = None
        return file

    @property
    def identity(self) -> tuple[int, int, int]:
        """Inode, size and time of the last write, as they were when the header was read."""
        return self._identity

    def numpy(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor's first axis; bfloat16 as uint16. A scalar is whole.

        Raises CheckpointError for a dtype that NumPy lacks, and when the file is shorter than it
        was or cannot be read.
        """
        entry = self.entries[name]
        if self._file is None:
            raise CheckpointError(f"{self.path.name}: only its header was read, not {name}.")
        dtype = DTYPES[entry.code].numpy
        if dtype is None:
            raise CheckpointError(
                f"{self.path.name}: {name} is stored as {entry.code}; "
                "the converter reads F32, F16, BF16 and MLX's quantized tensors."
            )
        rows = entry.shape[0] if entry.shape else 1
        stop = rows if stop is None else stop
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        found = np.empty(shape, dtype)
        offset = entry.start + start * prod(entry.shape[1:]) * found.itemsize
        self._read_into(found.reshape(-1).view(np.uint8).data, offset)
        return found

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """[stop - start, columns]: rows of a stack of matrices, counted through all of them."""
        entry = self.entries[name]
        dtype = DTYPES[entry.code].numpy
        assert dtype is not None
        found = np.empty((stop - start, entry.shape[-1]), dtype)
        offset = entry.start + start * entry.shape[-1] * found.itemsize
        self._read_into(found.reshape(-1).view(np.uint8).data, offset)
        return found

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        assert self._file is not None
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read: {error.strerror}; is its disk still there?"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} was cut short while it was read; download it again."
                )
            done += count

    def mlx(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """The same rows [stop - start, ...] as an MLX array of the stored dtype."""
        array = mx.array(self.numpy(name, start, stop))
        return array.view(mx.bfloat16) if self.entries[name].code == "BF16" else array

    def check_unchanged(self) -> None:
        """Raises CheckpointError when the file is not the one whose header was read."""
        if self._file is None:
            return
        try:
            now = identity_of(self.path.stat())
        except OSError as error:
            raise CheckpointError(f"{self.path} was removed while it was read.") from error
        if now != self._identity:
            raise CheckpointError(
                f"{self.path} changed while it was read; wait until it is whole and run the "
                "command again."
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
