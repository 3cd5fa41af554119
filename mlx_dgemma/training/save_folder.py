"""The folder that a run saves in: writable, and written by one run at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_dgemma.errors import InputError, ResourceError


def make_folder(folder: Path) -> None:
    """InputError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--adapter-path {folder} cannot be written: {error.strerror}.") from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other runs out, however this one ends, and removes the halves of files that killed ones
    left. ResourceError where another run has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(
                f"{folder}: another run is writing there; wait for it, or name another "
                "--adapter-path."
            ) from error
        except OSError:  # a file system without locks
            pass
        else:
            for half in folder.glob(".*.safetensors.[0-9]*-[0-9]*.safetensors"):
                with suppress(OSError):
                    half.unlink()
        yield
    finally:
        os.close(descriptor)
