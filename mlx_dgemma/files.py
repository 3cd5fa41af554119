"""Files that are written under a temporary name and then renamed."""

from __future__ import annotations

from pathlib import Path

from mlx_dgemma.errors import InputError


def check_replaceable(path: str | Path) -> None:
    """Refuses what the rename would replace by a file: a folder, a device, a pipe."""
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{path} is no regular file and must not be replaced: name another.")
