"""One thread owns the model; any thread may ask it.

MLX's streams belong to threads, and one canvas keeps the whole GPU busy. So an app or a server
hands its requests to a Runtime, which serves them on a thread of its own, taking turns by blocks.

    with Runtime() as runtime:                       # the bundled demo checkpoint
        for event in runtime.stream("Count from 3 to 9."):
            print(event.text, end="")
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Unpack

import numpy as np

from mlx_dgemma.asyncio_bridge import Deliver, arrivals
from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.checkpoint.plan import prepare
from mlx_dgemma.context.prompt_cache import check_cache
from mlx_dgemma.decisions import Decision
from mlx_dgemma.decisions.label_passes import DecideOptions, decide_turns
from mlx_dgemma.decisions.questions import Question
from mlx_dgemma.decoding.blocks import check_cancel
from mlx_dgemma.decoding.events import Commit, Event
from mlx_dgemma.generate import Options, Prompt, stream_generate
from mlx_dgemma.machine.gpu_failures import explained
from mlx_dgemma.model import Model
from mlx_dgemma.model_thread import ModelThread
from mlx_dgemma.prompt import Tokenizer

T = TypeVar("T")
log = logging.getLogger("mlx_dgemma.runtime")


class _Raised(NamedTuple):
    """What a function raised on the model's thread."""

    error: BaseException


class Runtime:
    """A loaded model behind a queue.

    path_or_hf_repo, lazy, revision, adapter_path, dtype, chat_template: as in `load`, which runs
    on the model's thread; the constructor returns when it has, and raises what it raised.
    kv_bits: the default of requests that do not name theirs.

    What the model will need is logged before it is loaded, as a warning where that is tight;
    ResourceError where it cannot fit.
    """

    def __init__(
        self,
        path_or_hf_repo: str | Path | None = None,
        *,
        lazy: bool = False,
        revision: str | None = None,
        adapter_path: str | Path | None = None,
        dtype: str | None = None,
        kv_bits: int | None = None,
        chat_template: str | Path | None = None,
    ) -> None:
        self._kv_bits = kv_bits
        self._thread = ModelThread()
        # Where a runtime is no longer held its thread ends, and its weights are freed.
        weakref.finalize(self, self._thread.end).atexit = False
        try:
            self.model: Model
            self.tokenizer: Tokenizer
            folder = _find(
                path_or_hf_repo,
                revision,
                adapter_path,
                planned=not lazy,
                kv_bits=kv_bits,
                dtype=dtype,
            )
            self.model, self.tokenizer = self.call(
                lambda: load(
                    folder,
                    lazy=lazy,
                    adapter_path=adapter_path,
                    dtype=dtype,
                    chat_template=chat_template,
                )
            )
        except BaseException:
            self.close()
            raise

    @property
    def waiting(self) -> int:
        """Requests accepted and not finished, the running one included."""
        return self._thread.waiting

    def submit(
        self,
        prompt: Prompt,
        deliver: Callable[[Event | BaseException | None], None],
        *,
        drafts: bool = False,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> threading.Event:
        """Queues `stream_generate`; options are its keywords. Returns the event that cancels it.

        Images are read on the model's thread too; hand over what `api.prepare_prompt` gives to
        read them on another.

        deliver: called on the model's thread with every event, with the exception if one ends
            the request, and with None at the end. If it raises, the request ends and the error
            is logged. Requests take turns block by block, so a short one does not wait for a
            long one to finish.
        """
        check_cancel(cancel)
        check_cache(options.get("cache"))
        cancel = cancel or threading.Event()
        if hasattr(prompt, "__array__"):  # an MLX array that is not computed belongs to its thread
            prompt = np.asarray(prompt)
        if options.get("cache") is None:
            options.setdefault("kv_bits", self._kv_bits)

        def events() -> Generator[Event, None, None]:
            yield from stream_generate(
                self.model, self.tokenizer, prompt, drafts=drafts, cancel=cancel, **options
            )

        self.take_turns(
            events(), deliver, cancel, turn_ends=lambda event: isinstance(event, Commit)
        )
        return cancel

    def take_turns(
        self,
        steps: Iterable[Any],
        deliver: Callable[[Any], None],
        cancel: threading.Event,
        *,
        turn_ends: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        """Queues any work in steps; `deliver` gets each, as in `submit`.

        cancel: set when the runtime closes; the steps must end soon after. turn_ends: after
            which steps another request may take its turn.
        """
        remaining, thread = iter(steps), self._thread

        def advance() -> None:
            try:
                for step in remaining:
                    deliver(step)
                    if turn_ends(step) and thread.requeue(advance):
                        return
            except BaseException as error:
                thread.over(cancel)
                deliver(error)
            else:
                thread.over(cancel)
            deliver(None)

        thread.submit(advance, cancel)

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
        self._thread.check_may_wait()
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        cancel = self.submit(prompt, arrived.put, drafts=drafts, cancel=cancel, **options)
        events = _receive(arrived, cancel)
        next(events)  # to its try: closing a generator that has not begun would run nothing of it
        return events

    async def astream(
        self,
        prompt: Prompt,
        *,
        drafts: bool = False,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Event, None]:
        """`stream` for asyncio: waiting for the next event leaves the loop free."""
        self._thread.check_may_wait()
        cancel = cancel or threading.Event()

        def start(deliver: Deliver) -> None:
            self.submit(prompt, deliver, drafts=drafts, cancel=cancel, **options)

        async with contextlib.aclosing(arrivals(start, cancel)) as events:
            async for event in events:
                yield event

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> str:
        """The whole answer; options are `stream_generate`'s keywords."""
        return "".join(event.text for event in self.stream(prompt, **options))

    def decide(
        self,
        state: Any,
        questions: Mapping[str, Question | Mapping[str, Any]],
        **options: Unpack[DecideOptions],
    ) -> Decision:
        """`mlx_dgemma.decide` on the model's thread; others take turns between its questions."""
        if options.get("cache") is None:
            options.setdefault("kv_bits", self._kv_bits)
        cancel = options.setdefault("cancel", threading.Event()) or threading.Event()
        turns = decide_turns(self.model, self.tokenizer, state, questions, **options)
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.take_turns(turns, arrived.put, cancel)
        for step in iter(arrived.get, None):
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, Decision):
                return step
        raise AssertionError("decide_turns ends with a Decision")

    def call(self, function: Callable[[], T]) -> T:
        """Runs any function on the model's thread and returns its result; InputError on that
        thread itself, as from `stream`, `astream` and `generate`."""
        self._thread.check_may_wait()
        outcome: queue.SimpleQueue[T | _Raised] = queue.SimpleQueue()

        def run() -> None:
            try:
                with explained():
                    value = function()
                outcome.put(value)
            except BaseException as error:
                outcome.put(_Raised(error))

        self._thread.submit(run)
        value = outcome.get()
        if isinstance(value, _Raised):
            raise value.error
        return value

    def close(self) -> None:
        """Cancels what runs and waits until the model's thread is done. Safe to call twice; in a
        forked process, which has no such thread, it does nothing. A runtime that is no longer held
        closes without waiting."""
        self._thread.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _find(
    path_or_hf_repo: str | Path | None,
    revision: str | None,
    adapter_path: str | Path | None,
    *,
    planned: bool,
    kv_bits: int | None,
    dtype: str | None,
) -> Path:
    """The checkpoint's folder; with `planned` once it is known that this machine can hold it."""
    if not planned:
        from mlx_dgemma.checkpoint.hub import resolve_model  # huggingface-hub takes a moment

        return resolve_model(path_or_hf_repo, revision=revision)
    folder, plan = prepare(
        path_or_hf_repo,
        revision=revision,
        adapter_path=adapter_path,
        kv_bits=kv_bits,
        dtype=dtype,
    )
    log.info("%s needs %s", path_or_hf_repo or "The demo checkpoint", plan)
    if plan.advice:
        log.warning(plan.advice)
    return folder


def _receive(
    arrived: queue.SimpleQueue[Any], cancel: threading.Event
) -> Generator[Any, None, None]:
    """None once, to begin with; then the events as they arrive. Closing it sets `cancel`."""
    try:
        yield None
        while not isinstance(event := arrived.get(), BaseException | None):
            yield event
    except BaseException:  # the reader leaves
        cancel.set()
        raise
    if event is not None:
        raise event
