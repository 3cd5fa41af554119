"""Which adapter a converted folder's weights already hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import is_plain, open_regular, read_json

JOURNAL = "conversion.json"  # what a conversion says of itself


def refuse_merged(model: Path, adapter: Path) -> None:
    """Raises CheckpointError where the adapter in one folder was merged into the other's weights,
    which would get its delta twice."""
    try:
        content = read_json(model / JOURNAL)
    except CheckpointError:
        return  # no conversion's folder, or one whose notes are lost
    merged = content.get("adapter") if isinstance(content, dict) else None
    digests = merged.get("sha256") if isinstance(merged, dict) else None
    for name, known in digests.items() if isinstance(digests, dict) else ():
        if not name.endswith(".safetensors") or not is_plain(name):
            continue
        try:
            with open_regular(adapter / name) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            continue
        if found == known:
            raise CheckpointError(
                f"{adapter} is merged into {model} already: leave out --adapter-path, or give the "
                "checkpoint that it was trained on."
            )
