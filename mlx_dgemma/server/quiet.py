"""A log that no client can fill: of each kind of warning one line a minute."""

from __future__ import annotations

import logging
import threading
import time
import traceback

_SECONDS = 60.0
_MOST_KINDS = 1000


class OncePerMinute(logging.Filter):
    """Lets the first warning or error of a kind pass, then none for a minute; the next one says
    how many were left out. A kind is the line of source that logs it, and that failed."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._kinds: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        kind = (record.name, record.pathname, record.lineno, *_failed_at(record))
        now = time.monotonic()
        with self._lock:
            since, left_out = self._kinds.get(kind, (now - _SECONDS, 0))
            if now - since < _SECONDS:
                self._kinds[kind] = since, left_out + 1
                return False
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            self._kinds[kind] = now, 0
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} more like it in the last minute)"
            record.args = ()
        return True


def _failed_at(record: logging.LogRecord) -> tuple[object, ...]:
    """Which exception, and where it was raised."""
    if not record.exc_info or record.exc_info[0] is None:
        return ()
    frames = traceback.extract_tb(record.exc_info[2])
    where = (frames[-1].filename, frames[-1].lineno) if frames else ()
    return record.exc_info[0], *where
