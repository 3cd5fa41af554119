"""An adapter's folder: which files it has, how large they are, and what tells it from another."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from mlx_dgemma.errors import ModelNotFoundError
from mlx_dgemma.files import read_json
from mlx_dgemma.headers import read_header
from mlx_dgemma.model.section import Section

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
ADVICE = "copy the adapter again"


def adapter_bytes(folder: str | Path) -> int:
    """Bytes of the matrices that loading an adapter adds; 0 for none or one of whole layers."""
    config = Path(folder) / CONFIG
    if os.path.exists(config):
        settings = Section(read_json(config), str(config))
        if settings.get("fine_tune_type") == "full":
            return 0
    paths = [Path(folder) / name for name in (PEFT_WEIGHTS, MLX_WEIGHTS)]
    headers = [read_header(path, ADVICE) for path in paths if os.path.exists(path)]
    return sum(entry.nbytes for header in headers[:1] for entry in header.entries.values())


def check_there(folder: Path) -> None:
    """ModelNotFoundError where this is no adapter's folder."""
    if not os.path.exists(folder / CONFIG):
        raise ModelNotFoundError(f"{folder} has no {CONFIG}; give the folder of an adapter.")


def adapter_identity(folder: str | Path | None) -> str:
    """SHA-256 of what is read of an adapter's folder; "" for no adapter. ModelNotFoundError without
    a folder."""
    if folder is None:
        return ""
    check_there(Path(folder))
    digest = hashlib.sha256()
    for name in (CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS):
        digest.update(name.encode())
        with suppress(FileNotFoundError), (Path(folder) / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
