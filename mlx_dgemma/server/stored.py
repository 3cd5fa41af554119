"""Responses kept for a bounded time, so that a later request may continue or quote them."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A response. input: the conversation that it answers. body: as it was sent, output last."""

    input: tuple[Item, ...]
    body: dict[str, Any]
    size: int
    at: float

    @property
    def items(self) -> tuple[Item, ...]:
        """The whole conversation, the reply's items last."""
        return (*self.input, *self.body["output"])


class StoredResponses:
    """The last responses: at most `most` of them, `max_bytes` together, `seconds` old.

    Conversations share the items of their earlier turns; a response counts for what it added. For
    any thread.
    """

    def __init__(
        self, most: int = 1000, max_bytes: int = 64 << 20, seconds: float = 24 * 3600
    ) -> None:
        self._most, self._max_bytes, self._seconds = most, max_bytes, seconds
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def put(self, body: dict[str, Any], before: Sequence[Item], added: Sequence[Item]) -> None:
        """Keeps a response by its id. before: what an earlier one holds. added: its own input."""
        size = sum(len(json.dumps(item, default=str)) for item in (body, *added))
        if size > self._max_bytes:
            return
        with self._lock:
            self._kept[body["id"]] = Stored((*before, *added), body, size, time.monotonic())
            self._size += size
            self._forget()

    def get(self, identity: str) -> Stored | None:
        """None when it is not kept any more."""
        with self._lock:
            self._forget()
            return self._kept.get(identity)

    def delete(self, identity: str) -> bool:
        """Whether there was such a response. Those that continue it keep what they took over."""
        with self._lock:
            stored = self._kept.pop(identity, None)
            self._size -= 0 if stored is None else stored.size
        return stored is not None

    def items(self) -> dict[str, Item]:
        """Every item of the kept conversations by its id, the newest of an id."""
        with self._lock:
            self._forget()
            kept = list(self._kept.values())
        items = (item for stored in kept for item in stored.items)
        return {item["id"]: item for item in items if isinstance(item.get("id"), str)}

    def _forget(self) -> None:
        oldest = time.monotonic() - self._seconds
        while self._kept:
            first = next(iter(self._kept.values()))
            if (
                len(self._kept) <= self._most
                and self._size <= self._max_bytes
                and first.at >= oldest
            ):
                return
            self._size -= first.size
            self._kept.popitem(last=False)
