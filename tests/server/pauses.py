"""How long an event loop stood still, and whether that was our doing or a busy machine's.

What is measured runs on one processor (`one_processor`). The seconds that it computed are the same
then whatever else the machine does, and a loop that gets no turn for many of them was held. Linux
also says of every thread how long it was ready and had no processor; where it is not asked (macOS),
the clock counts in full.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

_TASKS = "/proc/self/task"


@contextmanager
def one_processor() -> Iterator[None]:
    """Keeps every thread of this process on one processor, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    _keep_on({sorted(before)[os.getpid() % len(before)]})
    try:
        yield
    finally:
        _keep_on(before)


def _keep_on(processors: set[int]) -> None:
    for thread in os.listdir(_TASKS):
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread), processors)


class Waits:
    """Seconds that each thread was ready and had no processor; empty where nobody says."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def read(self) -> dict[str, float]:
        found = {}
        with suppress(OSError):
            for thread in os.listdir(_TASKS):
                try:
                    if thread not in self._files:
                        name = f"{_TASKS}/{thread}/schedstat"
                        self._files[thread] = os.open(name, os.O_RDONLY)
                    found[thread] = int(os.pread(self._files[thread], 99, 0).split()[1]) / 1e9
                except (OSError, IndexError):  # it has ended
                    self._forget(thread)
        return found

    def close(self) -> None:
        for thread in list(self._files):
            self._forget(thread)

    def _forget(self, thread: str) -> None:
        file = self._files.pop(thread, None)
        if file is not None:
            os.close(file)


class Stopwatch:
    """Seconds since it was made, as far as they are our doing; for the thread that made it.

    They are those that this process computed on its one processor, or more where all its threads
    slept: not those in which this one waited for the processor, nor those in which others waited
    for it and none ran, as one of them may have held the interpreter.
    """

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._before = waits.read()
        self._began, self._computed = time.monotonic(), time.process_time()

    def clock(self) -> float:
        return time.monotonic() - self._began

    def seconds(self) -> float:
        clock, computed = self.clock(), time.process_time() - self._computed
        after = self._waits.read()
        waited = {t: max(s - self._before.get(t, 0.0), 0.0) for t, s in after.items()}
        own = waited.pop(str(threading.get_native_id()), 0.0)
        slept = clock - own - min(sum(waited.values()), max(clock - own - computed, 0.0))
        return min(max(slept, computed), clock)


@dataclass(frozen=True)
class Pause:
    """A time for which an event loop ran nothing else.

    held: seconds of it that are our doing. clock: by the clock. doing: what was done at its
    beginning and at its end. alone: `held` when the same was done again with nothing beside it.
    """

    held: float
    clock: float
    doing: tuple[Any, Any]
    alone: tuple[float, ...] = field(default=(), compare=False)

    @property
    def certain(self) -> float:
        """What holds a loop holds it every time."""
        return min(self.held, *self.alone)


class Pauses:
    """The pauses of an event loop that took `noted` seconds or more; a context manager.

    A task asks for a turn every few milliseconds; a turn that comes late ends a pause. doing: says
    what is being done.
    """

    _TICK = 0.005

    def __init__(self, noted: float, doing: Callable[[], Any] = lambda: None) -> None:
        self.found: list[Pause] = []
        self.longest = 0.0  # noted or not
        self._noted, self._doing = noted, doing
        self._waits = Waits()

    async def __aenter__(self) -> Pauses:
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(2 * self._TICK)  # a pause that just ended is measured too
        self._task.cancel()
        self._waits.close()

    async def _watch(self) -> None:
        while True:
            watch, doing = Stopwatch(self._waits), self._doing()
            await asyncio.sleep(self._TICK)
            clock = watch.clock() - self._TICK
            if clock >= min(self._noted, self.longest):
                held = min(watch.seconds(), clock)
                self.longest = max(self.longest, held)
                if held >= self._noted:
                    self.found.append(Pause(held, clock, (doing, self._doing())))
