"""Contexts kept from request to request: an agent's system prompt and turns are read once.

A context is reused only where a request's ids begin with all the ids it was kept for, which is
the end of an earlier prompt: keys computed in another division of the same ids differ by
rounding, and a reply would depend on what was asked before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mlx_dgemma.prompt_cache import PromptCache


class Owner(Protocol):
    model: Any


class Lease:
    """One request's context. cached_tokens: how much of its prompt was already there."""

    def __init__(self, cache: PromptCache | None, cached: int, keep: Callable[[PromptCache], None]):
        self.cache = cache
        self.cached_tokens = cached
        self._keep = keep

    def give_back(self, intact: bool) -> None:
        """Called once, on the model's thread; a context whose request failed is dropped."""
        cache, self.cache = self.cache, None
        if cache is not None and intact and cache.ids:
            self._keep(cache)


class PrefixCache:
    """Idle contexts, the most recently used last; the oldest go when the budget is exceeded."""

    def __init__(self, owner: Owner, budget_bytes: int) -> None:
        self._owner = owner
        self._budget = budget_bytes
        self._idle: list[PromptCache] = []
        self._lock = threading.Lock()

    def lease(self, prompt: Sequence[int]) -> Lease:
        """The longest kept context that `prompt` continues, or a new one; any thread."""
        if not self._budget:
            return Lease(None, 0, self._keep)
        with self._lock:
            fitting = [kept for kept in self._idle if _continues(prompt, kept.ids)]
            if fitting:
                best = max(fitting, key=lambda kept: len(kept.ids))
                self._idle.remove(best)
                return Lease(best, len(best.ids), self._keep)
        return Lease(PromptCache(self._owner.model), 0, self._keep)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(kept.cache.nbytes for kept in self._idle)

    def _keep(self, cache: PromptCache) -> None:
        with self._lock:
            self._idle.append(cache)
            while self._idle and sum(kept.cache.nbytes for kept in self._idle) > self._budget:
                self._idle.pop(0)


def _continues(prompt: Sequence[int], ids: Sequence[int]) -> bool:
    # Strictly longer: the model needs at least one new token to go on from.
    return len(ids) <= len(prompt) and list(prompt[: len(ids)]) == list(ids)
