"""Contexts kept for later requests: an agent's system prompt, tools and turns are read once.

A prompt is read in pieces that end before a turn, a thought or a call begins, wherever the
piece is long enough. Where the pieces end depends on the ids before it alone, so prompts that
begin the same are divided the same, and a context kept at such an end holds, bit for bit, what
reading that prompt afresh would give. (Keys computed in another division differ by rounding,
enough to flip what a canvas accepts.)

Everything here but the constructor runs on the model's thread. `keys` are prompt ids in which an
image's placeholders carry its content: `PreparedPrompt.keys`.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from mlx_dgemma.context.disk_cache import DiskCache
from mlx_dgemma.context.prompt_cache import PromptCache
from mlx_dgemma.model.context import ContextCache, Frozen
from mlx_dgemma.prompt.tokenizer import Tokenizer

MARKERS = ("sot", "soc", "stc")
LEAST = 32  # tokens of a piece: a shorter encoder pass costs more than it can save
_REMEMBERED = 16  # prompts compared with new ones to learn what they share


class Owner(Protocol):
    model: Any
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Entry:
    """A context that holds a prompt's first keys.

    name: their digest. shared: the beginning of several conversations, or likely to be;
    otherwise one conversation's latest turn, which its next one replaces.
    """

    name: str
    keys: Sequence[int]
    frozen: Frozen
    shared: bool


class PrefixCache:
    """Contexts by their keys, the most recently used last; the oldest go when memory or, with a
    directory, disk is full. kv_bits: how all of them are kept, as in `PromptCache`."""

    def __init__(
        self,
        owner: Owner,
        budget_bytes: int,
        disk: DiskCache | None = None,
        kv_bits: int | None = None,
    ) -> None:
        self.owner = owner
        self.disk = disk
        self.kv_bits = kv_bits
        self._budget = budget_bytes
        self._markers = frozenset(
            owner.tokenizer.ids[name] for name in MARKERS if name in owner.tokenizer.ids
        )
        self._loops_on = owner.tokenizer.ids.get("etr")
        self._entries: dict[str, Entry] = {}
        self._recent: deque[np.ndarray] = deque(maxlen=_REMEMBERED)

    def lease(self, *, whole: bool = False) -> SharedContext | None:
        """One request's context; None when nothing is to be kept. Any thread.

        whole: others are likely to begin with this very prompt, so its end is kept as well.
        """
        return SharedContext(self, whole=whole) if self._budget else None

    @property
    def nbytes(self) -> int:
        return sum(entry.frozen.nbytes for entry in self._entries.values())

    def divisions(self, keys: Sequence[int]) -> list[int]:
        """Where the pieces of a prompt end."""
        found, last = [], 0
        for position, key in enumerate(keys):
            if key in self._markers and position - last >= LEAST:
                found.append(position)
                last = position
        return found

    def find(self, keys: Sequence[int], names: dict[int, str]) -> Entry | None:
        """The longest kept context that `keys` continues, from memory or disk.

        names: digests of the keys up to every division, and of all of them.
        """
        for length, name in sorted(names.items(), reverse=True):
            entry = self._entries.get(name)
            if entry is None and self.disk is not None:
                loaded = self.disk.load(name, keys[:length], self.owner.model, self.kv_bits)
                if loaded is not None:
                    entry = Entry(name, keys[:length], loaded.freeze(), True)
            if entry is not None:
                self.keep(entry)
                return entry
        return None

    def worth_keeping(self, keys: Sequence[int], divisions: Sequence[int]) -> dict[int, bool]:
        """The divisions of a new prompt to keep a context at -> whether others may share it.

        The first, after the system prompt and the tools; the longest that an earlier prompt
        shares; and the last, from which the conversation goes on. A tool loop goes on from its
        very end.
        """
        now = np.array(keys, dtype=np.int64)
        shared = max((_common(now, before) for before in self._recent), default=0)
        self._recent.append(now)
        going_on = len(keys) if keys and keys[-1] == self._loops_on else None
        chosen = {}
        if going_on is None:
            chosen = dict.fromkeys(divisions[-1:], False)
        elif going_on - (divisions[-1] if divisions else 0) >= LEAST:
            chosen = {going_on: False}
        learned = [at for at in divisions if at <= shared]
        return chosen | dict.fromkeys([*divisions[:1], *learned[-1:]], True)

    def keep(self, entry: Entry, instead_of: Entry | None = None) -> None:
        """Adds a context as the most recently used one."""
        if instead_of is not None and not instead_of.shared:
            self._entries.pop(instead_of.name, None)
        self._entries.pop(entry.name, None)
        self._entries[entry.name] = entry
        while self._entries and self.nbytes > self._budget:
            oldest = next(iter(self._entries))
            self._write(self._entries.pop(oldest))

    def flush(self) -> Iterator[int]:
        """Writes what is only in memory to disk, if there is one; yields after each context."""
        for number, entry in enumerate(list(self._entries.values())):
            self._write(entry)
            yield number

    def _write(self, entry: Entry) -> None:
        if self.disk is not None:
            context: ContextCache = self.owner.model.make_cache(self.kv_bits)
            context.copy_in(entry.frozen)
            self.disk.save(entry.name, entry.keys, context)


class SharedContext(PromptCache):
    """The context of one request, begun from a kept one. cached_tokens: how much that saved."""

    def __init__(self, store: PrefixCache, *, whole: bool = False) -> None:
        super().__init__(store.owner.model, store.kv_bits)
        self._whole = whole
        self._store = store
        self._divisions: list[int] = []
        self._names: dict[int, str] = {}
        self._chosen: dict[int, bool] = {}
        self._begun: Entry | None = None
        self.cached_tokens = 0

    def align(self, prompt: Sequence[int]) -> list[int]:
        self.ids = list(prompt)
        self._divisions = self._store.divisions(self.ids)
        self._names = _names(self.ids, self._divisions)
        self._begun = self._store.find(self.ids, self._names)
        if self._begun is not None:
            self.cached_tokens = len(self._begun.keys)
            self.cache.copy_in(self._begun.frozen)
        chosen = self._store.worth_keeping(self.ids, self._divisions)
        if self._whole:
            chosen[len(self.ids)] = True
        self._chosen = {at: shared for at, shared in chosen.items() if at > self.cached_tokens}
        if self._begun is not None and chosen.get(self.cached_tokens):
            self._begun = replace(self._begun, shared=True)
            self._store.keep(self._begun)
        return self.ids[self.cached_tokens :]

    def stops(self, prompt: Sequence[int]) -> Sequence[int]:
        return self._divisions

    def reached(self, offset: int) -> None:
        shared = self._chosen.get(offset)
        if shared is not None:
            frozen = self.cache.freeze()
            entry = Entry(self._names[offset], self.ids[:offset], frozen, shared)
            self._store.keep(entry, None if shared else self._begun)

    def mark(self, prompt: Sequence[int]) -> None:
        self.reached(len(prompt))


def _names(keys: Sequence[int], divisions: Sequence[int]) -> dict[int, str]:
    """Digests of the keys up to each division, and of all."""
    names = {}
    digest, start = hashlib.sha256(), 0
    for stop in [*divisions, len(keys)]:
        digest.update(np.array(keys[start:stop], dtype=np.int64).tobytes())
        names[stop], start = digest.hexdigest(), stop
    return names


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many keys two prompts share at their beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if different.size else length
