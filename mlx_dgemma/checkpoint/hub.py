"""From a folder's path or a Hugging Face Hub id to a checkpoint folder on this disk.

Everything that can refuse a download is asked before its first byte: the repository's files and
sizes, the disk, the memory. Downloads go to the Hub's own cache, so that files fetched by any
other program are reused and an interrupted download continues where it stopped.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_dgemma.checkpoint.known_repositories import (
    BESIDE_WEIGHTS,
    COMMUNITY,
    DEMO_NAME,
    KNOWN_REPOSITORIES,
)
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import InputError, ModelNotFoundError, ResourceError
from mlx_dgemma.headers import INDEX, read_weight_map
from mlx_dgemma.machine.hardware import Machine, machine
from mlx_dgemma.machine.memory import gigabytes, usable

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

# Kept free on the disk after a download.
DISK_RESERVE = 1_000_000_000

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_REPOSITORY = re.compile(r"(?a)(?!.*(--|\.\.|\.git$))[^\W_]([\w.-]*\w)?/[^\W_]([\w.-]{,94}\w)?")


def demo_path() -> Path:
    """The folder of the bundled demo checkpoint."""
    return CHECKPOINT


def local_folder(path_or_repo: str | Path) -> Path | None:
    """The folder of that name on this machine, if there is one.

    Raises ModelNotFoundError for a name that cannot be looked up.
    """
    try:
        folder = Path(path_or_repo).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError) as error:  # a name too long, a user unknown, no permission
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ModelNotFoundError(f"{path_or_repo} cannot be opened: {reason}.") from error


def repository_id(name: str) -> str:
    """The Hub id of a name that is no folder here: `4bit` is short for the known repository whose
    name ends so. Raises ModelNotFoundError for what cannot be an id either."""
    for known in KNOWN_REPOSITORIES:
        if known.short == name:
            return known.id
    _check_repository_name(name)
    return name


def _check_repository_name(name: str) -> None:
    if Path(name).expanduser().exists():
        raise ModelNotFoundError(f"{name} is a file; give the folder that holds the checkpoint.")
    if not _REPOSITORY.fullmatch(name):
        raise ModelNotFoundError(
            f"There is no folder {name}; give a checkpoint's folder, a Hub id such as "
            f"{COMMUNITY}-4bit, or one of the short names "
            f"{', '.join(known.short for known in KNOWN_REPOSITORIES)} and {DEMO_NAME}."
        )


def resolve_model(
    path_or_repo: str | Path | None,
    *,
    revision: str | None = None,
    to_load: bool = True,
    weights: bool = True,
    progress: bool = False,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """The folder that holds a model's files; downloads them when they are on the Hub alone.

    path_or_repo: a folder, a Hub id such as "mlx-community/diffusiongemma-26B-A4B-it-4bit", a
        short name such as "4bit", or None or "demo" for the bundled demo checkpoint.
    revision: branch, tag or commit of a repository.
    to_load: also refuse what this machine's memory cannot hold; False to convert, say.
    weights: False fetches the small files alone, which is enough to plan with.
    progress: show huggingface-hub's bars on standard error.
    cache_dir, endpoint: instead of the Hub's own (HF_HUB_CACHE, HF_ENDPOINT).

    Raises ModelNotFoundError for a missing folder, repository, revision or permission and an
    unreachable Hub, ResourceError when disk or memory does not suffice, InputError for a revision
    of the demo checkpoint or of a folder.
    """
    if path_or_repo is None or (path_or_repo == DEMO_NAME and not local_folder(DEMO_NAME)):
        if revision is not None:
            raise InputError(
                f"The demo checkpoint has no revision {revision}: name the repository as well "
                "(--model)."
            )
        return demo_path()
    folder = local_folder(path_or_repo)
    if folder is not None:
        if revision is not None:
            raise InputError(
                f"{folder} is a folder on this machine and has no revision {revision}: leave "
                "--revision out, or name the Hub repository."
            )
        return folder
    name = repository_id(str(path_or_repo))
    return _Repository(name, revision, cache_dir, endpoint).fetch(
        to_load and weights, weights, progress
    )


def explained(name: str, error: Exception, revision: str | None = None) -> Exception:
    """What a failure of the Hub means for the user; an unknown one comes back as it is."""
    return _Repository(name, revision, None, None)._explained(error)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Keeps huggingface-hub's bars off standard error unless they are to be shown."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silenced = not shown and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            enable_progress_bars()


class _Repository:
    """One repository at one revision, in the Hub's cache and on the Hub."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        cache_dir: str | Path | None,
        endpoint: str | None,
    ) -> None:
        from huggingface_hub import constants

        self.name = name
        self.revision = revision
        self.cache_dir = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.endpoint = endpoint or constants.ENDPOINT
        self.offline = bool(constants.HF_HUB_OFFLINE)

    def fetch(self, to_load: bool, weights: bool, progress: bool) -> Path:
        """The snapshot's folder, complete but for the weights where they are not asked for."""
        from huggingface_hub import HfApi

        if self.offline:
            return self._cached("HF_HUB_OFFLINE is set", weights)
        api = HfApi(endpoint=self.endpoint)
        try:
            info = api.model_info(
                self.name, revision=self.revision, files_metadata=True, timeout=15
            )
            files = self._needed(api, info)
        except Exception as error:
            return self._refused(error, weights)
        if not weights:
            files = {name: files[name] for name in files if not name.endswith(".safetensors")}
        missing = {name: size for name, size in files.items() if not self._here(name, info.sha)}
        if to_load:
            check_memory(self.name, files, machine())
        if missing and weights:
            self._check_disk(missing)
        return self._download(api, list(files), progress)

    def _needed(self, api: HfApi, info: ModelInfo) -> dict[str, int]:
        """Name -> size of the files a model needs: configs, tokenizer, and the index's shards."""
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if "config.json" not in sizes:
            raise ModelNotFoundError(
                f"{self.name} on the Hub has no config.json; it is not a model this program reads."
            )
        weights = [name for name in sizes if name.endswith(".safetensors") and "/" not in name]
        if INDEX in sizes:
            weights = self._indexed(api, weights)
        if not weights:
            raise ModelNotFoundError(
                f"{self.name} on the Hub has no safetensors files; use {COMMUNITY}-4bit, say."
            )
        wanted = [*SMALL_FILES, INDEX, *weights]
        return {name: sizes[name] for name in wanted if name in sizes}

    def _indexed(self, api: HfApi, weights: list[str]) -> list[str]:
        """The shards that the index names; files beside them may be another layout's copy."""
        path = api.hf_hub_download(
            self.name, INDEX, revision=self.revision, cache_dir=str(self.cache_dir)
        )
        named = set(read_weight_map(Path(path)).values())
        lost = sorted(named - set(weights))
        if lost:
            raise ModelNotFoundError(
                f"{self.name} on the Hub is incomplete: its index names {lost[0]}, which is not "
                "there."
            )
        return sorted(named)

    def _here(self, name: str, commit: str | None) -> bool:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.name, name, cache_dir=str(self.cache_dir), revision=commit
        )
        return isinstance(found, str)

    def _check_disk(self, missing: dict[str, int]) -> None:
        existing = self.cache_dir
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        # A file that was begun takes up disk already.
        blobs = self.cache_dir / ("models--" + self.name.replace("/", "--")) / "blobs"
        begun = sum(file.stat().st_blocks * 512 for file in blobs.glob("*.incomplete"))
        wanted = max(sum(missing.values()) - begun, 0)
        if wanted + DISK_RESERVE > free:
            raise ResourceError(
                f"{self.name} needs {gigabytes(wanted)} more on the disk and "
                f"{gigabytes(free)} is free at {existing}; free some, or point HF_HUB_CACHE to "
                "another disk."
            )

    def _download(self, api: HfApi, files: list[str], progress: bool) -> Path:
        try:
            # By the revision's name: the cache then knows it by that name offline, too.
            with progress_bars(progress):
                folder = api.snapshot_download(
                    self.name,
                    revision=self.revision,
                    cache_dir=str(self.cache_dir),
                    allow_patterns=files,
                )
        except Exception as error:
            raise self._explained(error) from error
        return Path(str(folder))

    def _refused(self, error: Exception, weights: bool) -> Path:
        """After the Hub said no or nothing: a complete copy here serves as well."""
        explained = self._explained(error)
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        if isinstance(error, ModelNotFoundError | GatedRepoError | RepositoryNotFoundError):
            raise explained from error
        try:
            return self._cached(str(explained), weights)
        except ModelNotFoundError:
            raise explained from error

    def _cached(self, reason: str, weights: bool) -> Path:
        """The snapshot in the local cache, if all of its files are there."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(
                snapshot_download(
                    self.name,
                    revision=self.revision,
                    cache_dir=str(self.cache_dir),
                    local_files_only=True,
                    allow_patterns=[*SMALL_FILES, INDEX],
                )
            )
        except (LocalEntryNotFoundError, OSError, ValueError) as error:
            complete = self._newest_complete(weights)
            if complete is not None:
                return complete
            raise ModelNotFoundError(
                f"{self.name} is not in the local Hub cache ({self.cache_dir}) and {reason}; "
                "download it while online."
            ) from error
        lost = _lost(folder, weights)
        if lost:
            complete = self._newest_complete(weights)
            if complete is not None:
                return complete
            raise ModelNotFoundError(
                f"The copy of {self.name} in the local Hub cache lacks {lost[0]} and {reason}; "
                "finish the download while online."
            )
        return folder

    def _newest_complete(self, weights: bool) -> Path | None:
        """A whole snapshot of no revision in particular: refs/ may be gone, or name a commit of
        which another program fetched the config alone."""
        if self.revision is not None:
            return None
        snapshots = self.cache_dir / ("models--" + self.name.replace("/", "--")) / "snapshots"
        found = [folder for folder in snapshots.glob("*") if not _lost(folder, weights)]
        return max(found, key=lambda folder: folder.stat().st_mtime, default=None)

    def _explained(self, error: Exception) -> Exception:
        """What a failure of the Hub means for the user; unknown kinds come back as they are."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            HTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        # In this order: a gated repository is a repository error, and both are HTTP errors.
        if isinstance(error, GatedRepoError):
            return ModelNotFoundError(
                f"{self.name} is gated: accept its terms on {self.endpoint}/{self.name} and log "
                "in with `hf auth login` (or set HF_TOKEN)."
            )
        if isinstance(error, RepositoryNotFoundError):
            return ModelNotFoundError(
                f"There is no repository {self.name} on {self.endpoint}, or it is private and "
                "your token does not open it: check the name, or log in with `hf auth login`."
            )
        if isinstance(error, RevisionNotFoundError):
            return ModelNotFoundError(f"{self.name} has no revision {self.revision!r}.")
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return ModelNotFoundError(f"{self.name} changed while it was read; try again.")
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            status = error.response.status_code
            if status in (401, 403):
                return ModelNotFoundError(
                    f"The Hub refused access to {self.name} ({status}): check your token "
                    "(`hf auth whoami`)."
                )
            return ModelNotFoundError(
                f"The Hub answered {status} for {self.name}; try again later."
            )
        if isinstance(error, HTTPError | LocalEntryNotFoundError | ConnectionError | TimeoutError):
            return ModelNotFoundError(
                f"The Hub at {self.endpoint} cannot be reached; check the connection and run the "
                "same command again: what was downloaded is kept."
            )
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            return ResourceError(f"{self.name} cannot be written to {self.cache_dir}: {reason}.")
        return error


def check_memory(name: str, files: dict[str, int], this: Machine) -> None:
    """Refuses a repository whose weights this machine cannot hold; names one that fits."""
    weights = sum(size for file, size in files.items() if file.endswith(".safetensors"))
    room = usable(this)
    if room is None or this.memory is None:
        return
    needed = weights + (BESIDE_WEIGHTS if weights > BESIDE_WEIGHTS else 0)
    if needed <= room:
        return
    fitting = [known for known in KNOWN_REPOSITORIES if known.memory_bytes <= room]
    if fitting:
        best = max(fitting, key=lambda known: known.weight_bytes)
        advice = f"{best.id} fits ({gigabytes(best.memory_bytes)})"
    else:
        smallest = min(KNOWN_REPOSITORIES, key=lambda known: known.weight_bytes)
        advice = f"the smallest, {smallest.id}, needs {gigabytes(smallest.memory_bytes)}"
    raise ResourceError(
        f"{name} needs {gigabytes(needed)} of memory ({gigabytes(weights)} weights), and this "
        f"machine has {gigabytes(this.memory)}, of which {gigabytes(room)} can be used; {advice}."
    )


def _lost(folder: Path, weights: bool) -> list[str]:
    """What a snapshot lacks of a model."""
    index = folder / INDEX
    shards = ["model.safetensors"] if weights else []
    if weights and index.is_file():
        shards = sorted(set(read_weight_map(index).values()))
    return [name for name in ["config.json", *shards] if not (folder / name).exists()]
