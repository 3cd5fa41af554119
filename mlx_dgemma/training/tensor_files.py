"""Tensor files that are replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_dgemma.errors import ResourceError
from mlx_dgemma.files import replacing


def write_tensors(path: Path, tensors: dict[str, mx.array], header: dict[str, str]) -> None:
    """A safetensors file that replaces `path` whole or not at all."""
    try:
        with replacing(path, ".safetensors", sync=True) as partial:
            mx.save_safetensors(str(partial), tensors, header)
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or 'the disk is full'}; "
            "the last save is kept."
        ) from error
