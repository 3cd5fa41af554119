"""The door: how many requests are inside, and how much memory they hold together.

A request is counted before its body is read, and what it sends is counted as it arrives, so that
neither many requests nor large ones can take more than the operator granted.
"""

from __future__ import annotations

import threading

from mlx_dgemma.server.errors import ApiError

_RETRY_SECONDS = 30  # the most a client is asked to wait


class Door:
    """Admits at most `limit` replies, which hold at most `memory` bytes together.

    turns: replies that run at a time; from it follows when to try again.
    """

    def __init__(self, limit: int, turns: int, memory: int) -> None:
        self._limit = limit
        self._turns = turns
        self._memory = memory
        self._lock = threading.Lock()
        self.admitted = 0
        self.held = 0
        self.closing = False

    def admit(self) -> Place:
        """A place for one reply; ApiError 429 when there is none, 503 when the server ends."""
        return Place(self)

    def check_open(self) -> None:
        if self.closing:
            raise shutting_down()

    def take(self, replies: int, nbytes: int) -> None:
        with self._lock:
            if self.admitted + replies > self._limit:
                raise ApiError(
                    429,
                    f"{self.admitted} requests are waiting already; try again in a moment.",
                    code="queue_full",
                    retry_after=min(60, 1 + self.admitted // self._turns),
                )
            if self.held + nbytes > self._memory:
                raise ApiError(
                    503,
                    f"The requests being served hold {self.held >> 20} MB of bodies and images, "
                    f"and {self._memory >> 20} MB are the most; try again in a moment.",
                    code="memory_full",
                    retry_after=_RETRY_SECONDS,
                )
            self.admitted += replies
            self.held += nbytes

    def give_back(self, replies: int, nbytes: int) -> None:
        with self._lock:
            self.admitted -= replies
            self.held -= nbytes


class Place:
    """What one request has of a door, until `release`. Any thread."""

    def __init__(self, door: Door) -> None:
        door.check_open()
        door.take(1, 0)
        self._door = door
        self._replies = 1
        self._held = 0

    def widen(self, replies: int) -> None:
        """Room for so many replies in all; ApiError 429 when there is none."""
        self._door.check_open()
        self._door.take(replies - self._replies, 0)
        self._replies = replies

    def hold(self, nbytes: int) -> None:
        """Counts memory; ApiError 503 when too much is held already."""
        self._door.take(0, nbytes)
        self._held += nbytes

    def release(self) -> None:
        """Gives everything back; safe to call twice."""
        replies, held = self._replies, self._held
        self._replies = self._held = 0
        self._door.give_back(replies, held)


def shutting_down() -> ApiError:
    return ApiError(
        503, "The server is shutting down; try again in a moment.", retry_after=_RETRY_SECONDS
    )
