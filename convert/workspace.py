"""The folder in which an output grows, and how it becomes the output.

Everything is written to `NAME.partial` beside the target, with a journal of the shards that are
whole. The same command run again goes on from there; the target's name appears by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_dgemma.checkpoint.merged import JOURNAL
from mlx_dgemma.convert.plan import Plan
from mlx_dgemma.convert.shards import file_digest, write_json
from mlx_dgemma.errors import CheckpointError, InputError, ResourceError
from mlx_dgemma.files import read_json
from mlx_dgemma.machine.memory import gigabytes

_LOCK = ".lock"
_REPLACED = ".replaced"  # a checkpoint that is being removed, whose files may be gone already
# Room for the small files beside the weights.
_SPARE_BYTES = 64 << 20


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a target that would destroy something, before anything is read.

    Raises InputError.
    """
    ours, theirs = target.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise InputError(f"{target}: the output cannot be the source or lie within it.")
    if not os.path.lexists(target):
        return
    if not os.path.isdir(target):
        raise InputError(f"{target} is no folder; choose another --mlx-path.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{target} exists; choose another --mlx-path or add --overwrite.")
    if not os.path.exists(target / "config.json"):
        raise InputError(f"{target} holds no checkpoint, so --overwrite leaves it alone.")


def check_disk(folder: Path, size: int) -> None:
    """Raises ResourceError unless `size` bytes of weights fit where `folder` is or will be."""
    while not os.path.exists(folder):
        folder = folder.parent
    needed, free = size + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder}: {gigabytes(needed)} are needed and {gigabytes(free)} are free; "
            "make room or choose another --mlx-path."
        )


def _remove_replaced(folder: Path) -> None:
    """Removes a checkpoint so that, wherever a kill comes, it is known not to be one any more."""
    marker = folder / _REPLACED
    with contextlib.suppress(OSError):
        if os.path.exists(folder / "config.json"):
            os.rename(folder / "config.json", marker)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != marker:
                path.unlink()
        marker.unlink()
        folder.rmdir()


class Workspace:
    """An exclusive hold on `NAME.partial` and its journal.

    source: the folder that is converted. overwrite: the target may be a checkpoint, which is
    then replaced.
    """

    def __init__(
        self,
        target: Path,
        source: Path,
        plan_id: str,
        provenance: dict[str, Any],
        *,
        overwrite: bool = False,
    ) -> None:
        self.target = target
        self._source = source
        self._overwrite = overwrite
        self.folder = target.with_name(target.name + ".partial")
        self._plan_id = plan_id
        self._provenance = provenance
        self.finished: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def hold(self) -> Iterator[Workspace]:
        """Create or reopen the folder; no other process may write it meanwhile.

        What a killed conversion left of the checkpoint it replaced is put back or removed.
        Raises ResourceError when it cannot be written or another conversion holds it, InputError
        when a folder has appeared at the target since it was first looked at.
        """
        with self._locked():
            try:
                self._settle_replaced()
                check_target(self.target, self._source, overwrite=self._overwrite)
                yield self
            finally:
                if os.path.isdir(self.folder) and [p.name for p in self.folder.iterdir()] == [
                    _LOCK
                ]:
                    shutil.rmtree(self.folder)  # refused before anything was written

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder's lock file, locked; the file that is locked is the one that lies there."""
        path = self.folder / _LOCK
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = path.open("w")
            except OSError as error:
                raise ResourceError(
                    f"{self.folder}: cannot be written ({error.strerror})."
                ) from error
            with lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise ResourceError(
                        f"{self.folder}: another conversion is writing there; wait for it."
                    ) from error
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                        yield
                        return
            # Between opening and locking, the conversion that held it published its folder.

    def _settle_replaced(self) -> None:
        """`NAME.old-PID` of a conversion that was killed while it replaced the target: the last
        whole checkpoint where there is no target, else superseded."""
        name = re.compile(re.escape(self.target.name) + r"\.old-[0-9]+")
        for old in sorted(self.target.parent.iterdir()):
            if not name.fullmatch(old.name):
                continue
            whole = os.path.isfile(old / "config.json")
            if os.path.isfile(old / _REPLACED) or (whole and os.path.lexists(self.target)):
                _remove_replaced(old)
            elif whole:
                old.rename(self.target)
            else:
                with contextlib.suppress(OSError):
                    old.rmdir()  # only what is empty: a kill came before its removal's last step

    def recover(self, plan: Plan, on_bytes: Callable[[int], None]) -> list[str]:
        """Which shards of an interrupted run can be kept; everything else there is removed.

        A shard is kept when the journal is of the same plan and its size and digest agree.
        """
        journal = self._read_journal()
        names = {shard.filename for shard in plan.shards}
        recorded = journal.get("shards") if journal.get("plan") == self._plan_id else None
        for name, record in recorded.items() if isinstance(recorded, dict) else ():
            path = self.folder / name
            if name not in names or not isinstance(record, dict) or not os.path.isfile(path):
                continue
            size = path.stat().st_size
            if record == {"bytes": size, "sha256": file_digest(path)}:
                self.finished[name] = record
                on_bytes(size)
        # The journal stays until it is rewritten: it marks the folder as ours.
        for path in self.folder.iterdir():
            if path.name not in self.finished and path.name not in (_LOCK, JOURNAL):
                shutil.rmtree(path) if os.path.isdir(path) else path.unlink()
        return sorted(self.finished)

    def _read_journal(self) -> dict[str, Any]:
        path = self.folder / JOURNAL
        others = [p.name for p in self.folder.iterdir() if p.name != _LOCK]
        if not os.path.exists(path):
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
        """Give the finished folder its name; an old output leaves only after the new one is in.

        Raises InputError, and leaves what was made as it is, when something appeared at the target
        that may not be replaced: the rename itself replaces nothing but an empty folder.
        """
        check_target(self.target, self._source, overwrite=self._overwrite)
        old = self.target.with_name(f"{self.target.name}.old-{os.getpid()}")
        replaced = self._overwrite and os.path.exists(self.target) and any(self.target.iterdir())
        if replaced:
            self.target.rename(old)
        try:
            self.folder.rename(self.target)
        except OSError as error:
            if replaced:
                old.rename(self.target)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise InputError(
                    f"{self.target} appeared while it was converted to; what was made stays in "
                    f"{self.folder}: move one of them away and run the same command again."
                ) from error
            raise
        with contextlib.suppress(OSError):
            (
                self.target / _LOCK
            ).unlink()  # kept until now, so that no other process takes the folder
        if replaced:
            _remove_replaced(old)
