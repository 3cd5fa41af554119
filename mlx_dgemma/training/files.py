"""Tensor files that are replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.errors import ResourceError


def write_tensors(path: Path, tensors: dict[str, mx.array], header: dict[str, str]) -> None:
    """A safetensors file that replaces `path` whole or not at all."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(partial), tensors, header)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or 'the disk is full'}; "
            "the last save is kept."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
