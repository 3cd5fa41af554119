"""Contexts in a directory, which outlive the server that read them.

A file names the model it belongs to and the versions that computed it, and counts only for
exactly those. It holds keys, values and token ids of a prompt, so it is its owner's alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_dgemma._version import __version__
from mlx_dgemma.errors import CheckpointError, DGemmaError, InputError, ResourceError
from mlx_dgemma.model.context import ContextCache

if TYPE_CHECKING:
    from mlx_dgemma.model import Model

log = logging.getLogger("mlx_dgemma.server")
_KEYS, _MADE_BY = "keys", "made_by"


class DiskCache:
    """Files `context-*.safetensors` in `directory`, at most `budget_bytes` of them together; the
    least recently used go first."""

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.stat()
            if status.st_mode & 0o077:  # it was there before, open to others
                directory.chmod(0o700)
        except OSError as error:
            raise InputError(
                f"The prompt cache cannot be kept in {directory}, for its owner alone: "
                f"{error.strerror}."
            ) from error
        if status.st_uid != os.getuid():
            raise InputError(
                f"The prompt cache cannot be kept in {directory}, which is another user's."
            )
        self._directory = directory
        self._budget = budget_bytes
        self._made_by = f"mlx_dgemma {__version__}, mlx {version('mlx')}"

    def load(
        self, name: str, keys: Sequence[int], model: Model, kv_bits: int | None = None
    ) -> ContextCache | None:
        """The context that holds exactly `keys`; None when there is none that can be trusted.

        name: a digest of the keys.
        """
        path = self._path(name, model, kv_bits)
        if not os.path.exists(path):
            return None
        try:
            context = ContextCache.load(path, model, kv_bits)
            known = json.loads(context.metadata.get(_KEYS, "null"))
            if known != list(keys) or context.metadata.get(_MADE_BY) != self._made_by:
                raise CheckpointError(f"{path} does not hold what its name says.")
            os.utime(path)
        except (DGemmaError, OSError, RuntimeError, ValueError, KeyError) as error:
            log.warning(
                json.dumps({"event": "prompt cache", "dropped": path.name, "why": str(error)})
            )
            with suppress(OSError):  # a folder of that name stays
                path.unlink(missing_ok=True)
            return None
        return context

    def save(self, name: str, keys: Sequence[int], context: ContextCache) -> None:
        """Writes a context, unless it is there; a full disk is logged and no more."""
        path = self._path(name, context, context.kv_bits)
        if os.path.exists(path):
            with suppress(OSError):
                os.utime(path)
            return
        context.metadata |= {_KEYS: json.dumps(list(keys)), _MADE_BY: self._made_by}
        before = os.umask(0o077)
        try:
            context.save(path)
        except ResourceError as error:
            log.warning(json.dumps({"event": "prompt cache", "why": str(error)}))
        finally:
            os.umask(before)
        self._shrink()

    def _path(self, name: str, model: Model | ContextCache, kv_bits: int | None) -> Path:
        """Named by everything that must agree, so that models and versions can share a folder."""
        whole = f"{self._made_by}\n{model.fingerprint()}\n{kv_bits}\n{name}"
        digest = hashlib.sha256(whole.encode()).hexdigest()
        return self._directory / f"context-{digest[:40]}.safetensors"

    def _shrink(self) -> None:
        files = []
        for path in self._directory.glob("context-*.safetensors"):
            with suppress(OSError):  # another server removed it
                files.append((path.stat(), path))
        total = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda file: file[0].st_mtime):
            if total <= self._budget:
                return
            total -= status.st_size
            with suppress(OSError):
                path.unlink()
