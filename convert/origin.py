"""Where a source comes from: a folder or the Hub, at which revision, and what was made of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_dgemma._version import __version__
from mlx_dgemma.checkpoint.adapters import Adapter
from mlx_dgemma.checkpoint.hub import local_folder, resolve_model
from mlx_dgemma.convert.plan import Plan, make_plan
from mlx_dgemma.convert.recipes import Recipe
from mlx_dgemma.convert.shards import file_digest
from mlx_dgemma.convert.source import Source, dense_shapes
from mlx_dgemma.convert.workspace import check_disk
from mlx_dgemma.files import read_json
from mlx_dgemma.model.config import ModelConfig


def resolve_source(
    path: str, revision: str | None, *, weights: bool = True, download_progress: bool = False
) -> Path:
    """The folder of a local checkpoint, or of a Hub repository after downloading it.

    weights: False downloads the small files alone.
    """
    return resolve_model(
        path, revision=revision, to_load=False, weights=weights, progress=download_progress
    )


def check_space_for(folder: Path, target: Path, recipe: Recipe, dtype: str | None) -> None:
    """Refuse, before the first byte of a weight, an output that will not fit the disk.

    folder: holds the source's config.json.
    """
    config, raw = ModelConfig.from_folder(folder), read_json(folder / "config.json")
    plan = make_plan(config, raw, dense_shapes(config), recipe, dtype=dtype or "bfloat16")
    check_disk(target.parent, plan.total_size)


def source_revision(folder: Path) -> str | None:
    """The commit of a folder inside the Hub cache."""
    resolved = folder.absolute()
    return resolved.name if resolved.parent.name == "snapshots" else None


def provenance_of(name: str, source: Source, plan: Plan, adapter: Adapter | None) -> dict[str, Any]:
    """What the output was made of; also what a resumed conversion compares."""
    files = {
        filename: {
            "bytes": file.size,
            "header_sha256": hashlib.sha256(file.header).hexdigest(),
            "inode": file.identity[0],
            "modified_ns": file.identity[2],
        }
        for filename, file in source.files.items()
    }
    merged = None
    if adapter is not None:
        merged = {
            "name": adapter.folder.name,
            "sha256": {
                path.name: file_digest(path)
                for path in sorted(adapter.folder.glob("adapter*"))
                if os.path.isfile(path)
            },
        }
    local = local_folder(name) is not None
    return {
        "made_by": "mlx_dgemma.convert",
        "source": {
            # Of a local folder the last part alone: the file may be published.
            "name": Path(name).absolute().name if local else name,
            "from_hub": not local,
            "revision": source_revision(source.folder),
            "files": files,
            "config_sha256": hashlib.sha256(
                json.dumps(source.raw_config, sort_keys=True).encode()
            ).hexdigest(),
        },
        "adapter": merged,
        "recipe": plan.recipe,
        "layout": plan.layout,
        "dtype": plan.dtype,
        "versions": {
            "mlx_dgemma": __version__,
            "mlx": version("mlx"),
            "python": platform.python_version(),
        },
    }
