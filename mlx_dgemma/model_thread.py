"""The thread that owns a model: jobs one after the other, in order, until it is closed.

It knows neither the model nor the runtime, and keeps no job that is done, so that a runtime that is
no longer held can be freed with its weights.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import ClassVar

from mlx_dgemma.errors import InputError
from mlx_dgemma.machine.process import claim_process

log = logging.getLogger("mlx_dgemma.runtime")
Job = Callable[[], None]


class _Worker:
    """A thread for one runtime after another.

    It never ends before the process does: MLX keeps compiled functions by thread, and freeing
    them as a thread dies takes the GIL, which aborts a program that is exiting.
    """

    idle: ClassVar[list[_Worker]] = []  # threads that wait for their next runtime

    def __init__(self) -> None:
        self.thread = threading.Thread(target=self._work, name="mlx_dgemma", daemon=True)
        self._given: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.thread.start()

    @classmethod
    def run(cls, function: Job) -> tuple[threading.Thread, threading.Event]:
        """Runs a function on an idle thread or a new one; the event is set when it has returned."""
        try:
            worker = cls.idle.pop()
        except IndexError:
            worker = cls()
        ended = threading.Event()

        def whole() -> None:
            try:
                function()
            finally:
                cls.idle.append(worker)
                ended.set()

        worker._given.put(whole)
        return worker.thread, ended

    def _work(self) -> None:
        while True:
            self._given.get()()


class ModelThread:
    """Jobs on a thread of their own. Every method may be called from any thread.

    waiting: jobs accepted and not finished, the running one included.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._running: list[threading.Event] = []  # once per request: several may share one
        self._process = os.getpid()
        claim_process()
        self._thread, self._ended = _Worker.run(self._serve)
        atexit.register(self.close)

    def submit(self, job: Job, cancel: threading.Event | None = None) -> None:
        """Queues a job; `close` sets its `cancel`, unless it was `over` before."""
        claim_process()
        with self._lock:
            if self._closed:
                raise InputError("This runtime is closed: make a new one.")
            if cancel is not None:
                self._running.append(cancel)
            self.waiting += 1
            self._jobs.put(job)

    def over(self, cancel: threading.Event) -> None:
        """The work that `cancel` ends has ended."""
        self._running.remove(cancel)

    def requeue(self, job: Job) -> bool:
        """Queues a job after those that wait; False when none does, or when closing."""
        with self._lock:
            if self._closed or self._jobs.empty():
                return False
            self.waiting += 1
            self._jobs.put(job)
            return True

    def check_may_wait(self) -> None:
        """Refuses to wait on the thread for what only that thread can do."""
        if threading.current_thread() is self._thread:
            raise InputError(
                "The model's own thread cannot wait for the runtime, as in a function given to "
                "runtime.call: use stream_generate there, or ask from another thread."
            )

    def close(self) -> None:
        """Cancels what runs and waits until the thread is done. Safe to call twice; in a forked
        process, which has no such thread, it does nothing."""
        if os.getpid() != self._process:
            return
        self.check_may_wait()
        if self.end():
            self._ended.wait()

    def end(self) -> bool:
        """`close` without waiting; whether it was open."""
        if os.getpid() != self._process:
            return False
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        for cancel in list(self._running):
            cancel.set()
        self._jobs.put(None)
        atexit.unregister(self.close)
        return True

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:  # of `deliver`: other requests must not suffer for it
                log.exception("What receives a request's events raised; the request ends here.")
            del job  # it holds the runtime, which nobody else may any more
            with self._lock:
                self.waiting -= 1
