"""One thread owns the model; any thread may ask it.

MLX's streams belong to threads, and one canvas fills the machine: so an app or a server hands
its requests to a Runtime, which serves them in order on a thread of its own.

    with Runtime() as runtime:                       # the bundled demo checkpoint
        for event in runtime.stream("Count from 3 to 9."):
            print(event.text, end="")
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar, Unpack

from mlx_dgemma.api import Options, Prompt, load, stream_generate
from mlx_dgemma.decoding.events import Event
from mlx_dgemma.errors import InputError
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer

T = TypeVar("T")
_END = object()


class Runtime:
    """A loaded model behind a queue.

    path_or_hf_repo, lazy, revision, adapter_path: as in `load`, which runs on the model's
    thread; the constructor returns when it has, and raises what it raised.
    """

    def __init__(
        self,
        path_or_hf_repo: str | Path | None = None,
        *,
        lazy: bool = False,
        revision: str | None = None,
        adapter_path: str | Path | None = None,
    ) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._closed = False
        self._running: set[threading.Event] = set()
        self._thread = threading.Thread(target=self._serve, name="mlx_dgemma", daemon=True)
        self._thread.start()
        try:
            self.model: Model
            self.tokenizer: Tokenizer
            self.model, self.tokenizer = self.call(
                lambda: load(
                    path_or_hf_repo, lazy=lazy, revision=revision, adapter_path=adapter_path
                )
            )
        except BaseException:
            self.close()
            raise

    @property
    def waiting(self) -> int:
        """Requests accepted and not finished, the running one included."""
        return self._waiting

    def stream(
        self,
        prompt: Prompt,
        *,
        drafts: bool = False,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> Generator[Event, None, None]:
        """`stream_generate` on the model's thread; options are its keywords.

        The request is queued at once. Setting `cancel` or closing the generator ends it
        between two denoising steps. Errors are raised here, in the caller's thread.
        """
        cancel = cancel or threading.Event()
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def run() -> None:
            try:
                stream = stream_generate(
                    self.model, self.tokenizer, prompt, drafts=drafts, cancel=cancel, **options
                )
                for event in stream:
                    events.put(event)
            except BaseException as error:
                events.put(error)
            finally:
                self._running.discard(cancel)
                events.put(_END)

        self._running.add(cancel)
        self._submit(run)
        return _receive(events, cancel)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> str:
        """The whole answer; options are `stream_generate`'s keywords."""
        return "".join(event.text for event in self.stream(prompt, **options))

    def call(self, function: Callable[[], T]) -> T:
        """Runs any function on the model's thread and returns its result."""
        outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcome.put((True, function()))
            except BaseException as error:
                outcome.put((False, error))

        self._submit(run)
        worked, value = outcome.get()
        if not worked:
            raise value
        return value

    def close(self) -> None:
        """Cancels what runs and waits, then ends the thread. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for cancel in list(self._running):
            cancel.set()
        self._jobs.put(None)
        self._thread.join()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise InputError("This runtime is closed: make a new one.")
            self._waiting += 1
            self._jobs.put(job)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            with self._lock:
                self._waiting -= 1


def _receive(
    events: queue.SimpleQueue[Any], cancel: threading.Event
) -> Generator[Event, None, None]:
    try:
        while (event := events.get()) is not _END:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        cancel.set()
