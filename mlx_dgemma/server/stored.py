"""Responses kept for a bounded time, so that a later request may continue or quote them."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]


@dataclass(frozen=True)
class _Stored:
    items: tuple[Item, ...]  # the whole conversation, the reply's items last
    size: int
    at: float


class StoredResponses:
    """The last responses: at most `most` of them, `max_bytes` together, `seconds` old.

    Conversations share the items of their earlier turns; a response counts for what it added.
    """

    def __init__(
        self, most: int = 1000, max_bytes: int = 64 << 20, seconds: float = 24 * 3600
    ) -> None:
        self._most, self._max_bytes, self._seconds = most, max_bytes, seconds
        self._kept: OrderedDict[str, _Stored] = OrderedDict()
        self._size = 0

    def put(self, identity: str, before: Sequence[Item], added: Sequence[Item]) -> None:
        """Keeps a response. before: what an earlier one holds already. added: input and output."""
        size = sum(len(json.dumps(item, default=str)) for item in added)
        if size > self._max_bytes:
            return
        self._kept[identity] = _Stored((*before, *added), size, time.monotonic())
        self._size += size
        self._forget()

    def conversation(self, identity: str) -> tuple[Item, ...] | None:
        """The items up to and with this response; None when it is not kept any more."""
        self._forget()
        stored = self._kept.get(identity)
        return None if stored is None else stored.items

    def item(self, identity: str) -> Item | None:
        """An item of a kept conversation by its id, the newest first."""
        self._forget()
        for stored in reversed(self._kept.values()):
            for item in reversed(stored.items):
                if item.get("id") == identity:
                    return item
        return None

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
