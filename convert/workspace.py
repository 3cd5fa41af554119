"""The folder in which an output grows, and how it becomes the output.

Everything is written to `NAME.partial` beside the target, with a journal of the shards that are
whole. The same command run again goes on from there; the target's name appears by one rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_dgemma.convert.plan import Plan
from mlx_dgemma.convert.shards import file_digest, write_json
from mlx_dgemma.errors import CheckpointError, InputError, ResourceError
from mlx_dgemma.machine.memory import gigabytes
from mlx_dgemma.model.config import read_json

JOURNAL = "conversion.json"
_LOCK = ".lock"
# Room for the small files beside the weights.
_SPARE_BYTES = 64 << 20


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a target that would destroy something, before anything is read.

    Raises InputError.
    """
    ours, theirs = target.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise InputError(f"{target}: the output cannot be the source or lie within it.")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file; choose another --mlx-path.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{target} exists; choose another --mlx-path or add --overwrite.")
    if not (target / "config.json").exists():
        raise InputError(f"{target} holds no checkpoint, so --overwrite leaves it alone.")


def check_disk(folder: Path, size: int) -> None:
    """Raises ResourceError unless `size` bytes of weights fit where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    needed, free = size + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder}: {gigabytes(needed)} are needed and {gigabytes(free)} are free; "
            "make room or choose another --mlx-path."
        )


class Workspace:
    """An exclusive hold on `NAME.partial` and its journal."""

    def __init__(self, target: Path, plan_id: str, provenance: dict[str, Any]) -> None:
        self.target = target
        self.folder = target.with_name(target.name + ".partial")
        self._plan_id = plan_id
        self._provenance = provenance
        self.finished: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def hold(self) -> Iterator[Workspace]:
        """Create or reopen the folder; nobody else may write it meanwhile.

        Raises ResourceError when it cannot be written or another conversion holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / _LOCK).open("w")
        except OSError as error:
            raise ResourceError(f"{self.folder}: cannot be written ({error.strerror}).") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ResourceError(
                    f"{self.folder}: another conversion is writing there; wait for it."
                ) from error
            try:
                yield self
            finally:
                if self.folder.is_dir() and [p.name for p in self.folder.iterdir()] == [_LOCK]:
                    shutil.rmtree(self.folder)  # refused before anything was written

    def recover(self, plan: Plan, on_bytes: Callable[[int], None]) -> list[str]:
        """Which shards of an interrupted run can be kept; everything else there is removed.

        A shard is kept when the journal is of the same plan and its size and digest agree.
        """
        journal = self._read_journal()
        names = {shard.filename for shard in plan.shards}
        recorded = journal.get("shards", {}) if journal.get("plan") == self._plan_id else {}
        for name, record in recorded.items():
            path = self.folder / name
            if name not in names or not path.exists() or path.stat().st_size != record["bytes"]:
                continue
            if file_digest(path) == record["sha256"]:
                self.finished[name] = record
                on_bytes(record["bytes"])
        # The journal stays until it is rewritten: it marks the folder as ours.
        for path in self.folder.iterdir():
            if path.name not in self.finished and path.name not in (_LOCK, JOURNAL):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return sorted(self.finished)

    def _read_journal(self) -> dict[str, Any]:
        path = self.folder / JOURNAL
        others = [p.name for p in self.folder.iterdir() if p.name != _LOCK]
        if not path.exists():
            if any(not name.endswith(".tmp") for name in others):
                raise InputError(
                    f"{self.folder} exists and is not an unfinished conversion; move it away."
                )
            return {}
        try:
            journal = read_json(path)
        except CheckpointError:
            return {}
        return journal if isinstance(journal, dict) else {}

    def check_space(self, plan: Plan) -> None:
        """Raises ResourceError when the disk cannot take what is still to be written."""
        kept = sum(record["bytes"] for record in self.finished.values())
        check_disk(self.folder, plan.total_size - kept)

    def write_journal(self, **extra: Any) -> None:
        content = {**self._provenance, "plan": self._plan_id, "shards": self.finished, **extra}
        write_json(self.folder / JOURNAL, content)

    def record(self, filename: str, entry: dict[str, Any]) -> None:
        """A shard is whole: remember it."""
        self.finished[filename] = entry
        self.write_journal()

    def discard(self) -> None:
        """The source turned out to be damaged, so nothing made of it is worth keeping."""
        shutil.rmtree(self.folder)

    def publish(self) -> None:
        """Give the finished folder its name; an old output leaves only after the new one is in."""
        (self.folder / _LOCK).unlink()
        old = self.target.with_name(f"{self.target.name}.old-{os.getpid()}")
        replaced = self.target.exists() and any(self.target.iterdir())
        if replaced:
            self.target.rename(old)
        try:
            self.folder.rename(self.target)
        except OSError:
            if replaced:
                old.rename(self.target)
            raise
        if replaced:
            shutil.rmtree(old)
