"""`mlx_dgemma.models`: what is on this disk and on the Hub; downloads and removes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mlx_dgemma.checkpoint.hub import local_folder, repository_id, resolve_model
from mlx_dgemma.checkpoint.known_repositories import KNOWN_REPOSITORIES
from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.command import Parser, command
from mlx_dgemma.errors import InputError, ModelNotFoundError
from mlx_dgemma.files import read_bytes
from mlx_dgemma.headers import INDEX, read_weight_map
from mlx_dgemma.machine.memory import gigabytes
from mlx_dgemma.model.config import MODEL_TYPE
from mlx_dgemma.untrusted_json import parse

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo


@dataclass(frozen=True)
class Listed:
    """A model of the list. name: what `--model` takes. disk_bytes: what the Hub's cache holds.

    state: "ready", "partial" (a download that can be continued) or "not here".
    """

    name: str
    repository: str
    weight_bytes: int | None
    disk_bytes: int
    state: str


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.models",
        description="Lists the models on this disk and on the Hub, downloads one, or removes one. "
        "They lie in the Hugging Face cache, where other programs find them too.",
    )
    flags.add_version(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    verbs = parser.add_subparsers(dest="verb", metavar="{list,download,remove}")
    verbs.add_parser("list", help="the models here and on the Hub (the default)")
    download = verbs.add_parser("download", help="fetch a model; an interrupted one goes on")
    download.add_argument("name", help="a short name such as 4bit, or a Hub id")
    download.add_argument("--revision", help="branch, tag or commit of the repository")
    remove = verbs.add_parser("remove", help="delete a model from the cache")
    remove.add_argument("name", help="a short name such as 4bit, or a Hub id")
    remove.add_argument("--yes", "-y", action="store_true", help="do not ask")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.verb == "download":
        done = download(arguments.name, arguments.revision)
    elif arguments.verb == "remove":
        done = remove(arguments.name, arguments.yes)
    else:
        found = models()
        if arguments.json:
            print(json.dumps({"models": [asdict(model) for model in found]}))
        else:
            show(found, Console(highlight=False, markup=False))
        return 0
    print(json.dumps(done) if arguments.json else "\n".join(f"{k}: {v}" for k, v in done.items()))
    return 0


def models() -> list[Listed]:
    """The known repositories, then what else of this kind the Hub's cache holds."""
    cached = {repo.repo_id: repo for repo in _cache().repos if repo.repo_type == "model"}
    found = []
    for known in KNOWN_REPOSITORIES:
        repo = cached.pop(known.id, None)
        size = repo.size_on_disk if repo else 0
        folders = [revision.snapshot_path for revision in repo.revisions] if repo else []
        state = _state(folders) if size else "not here"
        found.append(Listed(known.short, known.id, known.weight_bytes, size, state))
    for repo in cached.values():
        folders = [revision.snapshot_path for revision in repo.revisions]
        if any(_is_ours(folder) for folder in folders):
            name = repo.repo_id
            found.append(Listed(name, name, None, repo.size_on_disk, _state(folders)))
    return found


def _cache() -> HFCacheInfo:
    from huggingface_hub import HFCacheInfo, constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:  # nothing was ever downloaded
        return HFCacheInfo(
            size_on_disk=0, repos=frozenset(), incomplete_files=frozenset(), warnings=[]
        )


def _state(folders: Sequence[Path]) -> str:
    return "ready" if any(_is_whole(folder) for folder in folders) else "partial"


def _is_whole(folder: Path) -> bool:
    if not os.path.isfile(folder / "config.json"):
        return False
    if os.path.isfile(folder / INDEX):
        return all(os.path.isfile(folder / name) for name in set(read_weight_map(folder).values()))
    return any(folder.glob("*.safetensors"))


def _is_ours(folder: Path) -> bool:
    try:
        config = parse(read_bytes(folder / "config.json", 1 << 20))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def show(found: Sequence[Listed], console: Console) -> None:
    table = Table("--model", "weights", "on this disk", "", box=None, pad_edge=False)
    for model in found:
        weights = "" if model.weight_bytes is None else gigabytes(model.weight_bytes)
        here = gigabytes(model.disk_bytes) if model.disk_bytes else ""
        table.add_row(model.name, weights, here, model.state)
    table.add_row("demo", "", "", "part of this package")
    console.print(table)


def download(name: str, revision: str | None) -> dict[str, str]:
    """Fetches a repository into the Hub's cache, with bars on a terminal."""
    folder = resolve_model(name, revision=revision, to_load=False, progress=sys.stderr.isatty())
    return {"model": name, "folder": str(folder)}


def remove(name: str, sure: bool) -> dict[str, str]:
    """Deletes every revision of a repository from the Hub's cache, after asking."""
    if local_folder(name) is not None:
        raise InputError(f"{name} is a folder of yours, not part of the cache: delete it yourself.")
    repository = repository_id(name)
    cache = _cache()
    repo = next((each for each in cache.repos if each.repo_id == repository), None)
    if repo is None:
        raise ModelNotFoundError(
            f"{repository} is not on this disk: mlx_dgemma.models lists what is."
        )
    size = gigabytes(repo.size_on_disk)
    if not sure:
        if not sys.stdin.isatty():
            raise InputError(f"Removing {repository} deletes {size}: say so with --yes.")
        if input(f"Delete {repository}, {size}? [y/N] ").strip().lower() not in ("y", "yes"):
            return {"model": repository, "freed": "nothing"}
    # Of this repository alone: a duplicate of it has commits of the same names.
    own = replace(cache, repos=frozenset({repo}))
    own.delete_revisions(*(revision.commit_hash for revision in repo.revisions)).execute()
    return {"model": repository, "freed": size}
