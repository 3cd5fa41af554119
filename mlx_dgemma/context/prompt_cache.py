"""A conversation's context, kept from turn to turn and on disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.untrusted_json import UntrustedJSONError, parse

if TYPE_CHECKING:
    from mlx_dgemma.model import ContextCache, Model
    from mlx_dgemma.model.context import Snapshot

_IDS = "prompt_ids"
T = TypeVar("T")


class PromptCache:
    """The context of the last prompt, so that the next turn reads only what is new.

    A prompt that begins with the last one's ids continues from its end; any other starts
    afresh. Contexts are reused at that boundary alone: keys computed in other chunks differ by
    rounding, enough to change what a canvas accepts.

    kv_bits: 8 keeps the context of full-attention layers in 8 bits; None keeps it exactly.

    One request at a time: a second one, `save` and `reset` raise InputError meanwhile.

    A prompt with images is given by its `PreparedPrompt.keys`, in which placeholders carry
    their picture's content: the ids alone are the same for all pictures.
    """

    def __init__(self, model: Model, kv_bits: int | None = None) -> None:
        self._model = model
        self.kv_bits = kv_bits
        self.cache: ContextCache = model.make_cache(kv_bits)
        self.ids: list[int] = []
        self._snapshot: Snapshot | None = None
        self._busy = threading.Lock()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the cache to one request; InputError when another has it."""
        if not self._busy.acquire(blocking=False):
            raise InputError(
                "This PromptCache is in use by another request: wait until that one has ended, or "
                "give each request a cache of its own."
            )
        try:
            yield
        finally:
            self._busy.release()

    def align(self, prompt: Sequence[int]) -> list[int]:
        """Takes the cache back to where `prompt` continues it; returns the ids still to read."""
        prompt = list(prompt)
        if self._snapshot is None or prompt[: len(self.ids)] != self.ids:
            self.forget()
            return prompt
        self.cache.restore(self._snapshot)
        return prompt[len(self.ids) :]

    def stops(self, prompt: Sequence[int]) -> Sequence[int]:
        """Offsets in `prompt` at which an encoder pass must end; `reached` is then called."""
        return ()

    def reached(self, offset: int) -> None:
        """The cache holds `prompt` up to one of the stops."""

    def mark(self, prompt: Sequence[int]) -> None:
        """Notes that the cache now holds exactly `prompt`, and remembers this moment."""
        self.ids = list(prompt)
        self._snapshot = self.cache.snapshot()

    def reset(self) -> None:
        """Forgets everything."""
        with self.in_use():
            self.forget()

    def forget(self) -> None:
        """`reset`, for the request that has the cache."""
        self.cache = self._model.make_cache(self.kv_bits)
        self.ids = []
        self._snapshot = None

    def save(self, path: str | Path) -> None:
        """Writes the prompt's context to a safetensors file, whole or not at all."""
        with self.in_use():
            self.align(self.ids)
            self.cache.metadata[_IDS] = json.dumps(self.ids)
            self.cache.save(path)

    @classmethod
    def load(cls, path: str | Path, model: Model, kv_bits: int | None = None) -> PromptCache:
        """Reads what `save` wrote for this model and with these `kv_bits`; raises CheckpointError
        for anything else."""
        from mlx_dgemma.model import ContextCache

        loaded = cls(model, kv_bits)
        loaded.cache = ContextCache.load(path, model, kv_bits)
        try:
            ids = parse(loaded.cache.metadata.get(_IDS, "null"))
        except UntrustedJSONError:
            ids = None
        whole = isinstance(ids, list) and all(type(key) is int for key in ids)
        if not whole or len(ids) != loaded.cache.offset:
            raise CheckpointError(f"{path} does not say which prompt it holds; save it again.")
        loaded.mark(ids)
        return loaded


def check_cache(cache: object) -> None:
    """Refuses what is no PromptCache, before a request gets far with it."""
    if cache is not None and not isinstance(cache, PromptCache):
        raise InputError(
            f"cache is a PromptCache or None, not a {type(cache).__name__}: make one with "
            "PromptCache(model)."
        )


def exclusively(cache: PromptCache | None, events: Iterator[T]) -> Generator[T, None, None]:
    """The events, with the cache kept to this request from the first to the last."""
    with nullcontext() if cache is None else cache.in_use():
        yield from events
