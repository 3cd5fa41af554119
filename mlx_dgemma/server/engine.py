"""Admits requests, hands them to the model's thread, and frees what they held.

The engine knows nothing of HTTP. A request waits for one of `max_concurrent` places; those in
a place take turns on the model block by block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mlx_dgemma.asyncio_bridge import Deliver, arrivals
from mlx_dgemma.context.disk_cache import DiskCache
from mlx_dgemma.context.prefix_cache import PrefixCache
from mlx_dgemma.context.prompt_cache import PromptCache
from mlx_dgemma.decisions import Decision
from mlx_dgemma.decisions.canvas_read import CanvasForm, CanvasRead, read_canvas_turns
from mlx_dgemma.decisions.label_passes import decide_turns
from mlx_dgemma.decisions.questions import Question
from mlx_dgemma.decoding.events import Commit, Draft, Finish
from mlx_dgemma.errors import CancelledError, InputError
from mlx_dgemma.infilling import Infill, infill_turns
from mlx_dgemma.model.scores import Scores
from mlx_dgemma.prompt.holes import Hole
from mlx_dgemma.prompt.media import PreparedPrompt
from mlx_dgemma.prompt.tokenizer import Tokenizer
from mlx_dgemma.scoring import prompt_score_turns
from mlx_dgemma.server.admission import Door, shutting_down
from mlx_dgemma.server.errors import ApiError, as_api_error
from mlx_dgemma.server.metrics import Metrics
from mlx_dgemma.server.settings import ServerSettings

log = logging.getLogger("mlx_dgemma.server")


class Model(Protocol):
    """What the engine needs of a Runtime; tests bring a scripted one."""

    model: Any
    tokenizer: Tokenizer

    @property
    def submit(self) -> Callable[..., threading.Event]:
        """(prompt, deliver, **options) -> the event that cancels the request."""

    @property
    def take_turns(self) -> Callable[..., None]:
        """(steps, deliver, cancel): any other work on the model's thread, step by step."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Call:
    """One reply to generate.

    prompt: as `stream_generate` takes it. prompt_ids: what they encode to.
    options: its keywords. drafts: whether Draft events are wanted. warnings: what the request
    asked for and does not get. source: where the events come from, if not from the block loop.
    """

    prompt: Any
    prompt_ids: list[int]
    options: dict[str, Any]
    drafts: bool = False
    warnings: tuple[str, ...] = ()
    source: Source | None = None

    def with_seed(self, seed: int) -> Call:
        return replace(self, options={**self.options, "seed": seed})


@dataclass(frozen=True)
class Ended:
    """The last event of a call. timed_out: the server's time limit ended it. notes: warnings."""

    finish: Finish
    cached_tokens: int
    timed_out: bool
    notes: tuple[str, ...] = ()


# (engine, call, deadline of time.monotonic) -> the call's events
Source = Callable[["Engine", Call, float], AsyncGenerator[Draft | Commit | Ended, None]]


class Engine:
    """The Runtime with a door in front of it."""

    def __init__(self, runtime: Model, settings: ServerSettings, metrics: Metrics) -> None:
        self.runtime = runtime
        self.settings = settings
        self.metrics = metrics
        self.tokenizer = runtime.tokenizer
        self.door = Door(
            settings.max_concurrent + settings.max_waiting,
            settings.max_concurrent,
            max(settings.max_request_memory, 6 * settings.max_body_bytes),
        )
        self._places = asyncio.Semaphore(settings.max_concurrent)
        self._waiting = 0  # for a place
        self._cancels: set[threading.Event] = set()
        disk = None
        if settings.prompt_cache_dir is not None:
            disk = DiskCache(settings.prompt_cache_dir, settings.prompt_cache_dir_bytes)
        self._prefixes = PrefixCache(runtime, settings.prefix_cache_bytes, disk, settings.kv_bits)
        self._kept: dict[str, int] = (
            {} if settings.kv_bits is None else {"kv_bits": settings.kv_bits}
        )

    @property
    def room(self) -> int:
        """Prompt tokens that fit beside one canvas, within the operator's limit."""
        config = self.runtime.model.config
        room: int = config.text.max_position_embeddings - config.canvas_length
        return min(room, self.settings.max_prompt_tokens or room)

    async def run(self, call: Call) -> AsyncGenerator[Draft | Commit | Ended, None]:
        """The events of one call. Leaving the generator cancels it within a denoising step."""
        deadline = time.monotonic() + self.settings.max_seconds
        async with self._place():
            source = Engine.stream if call.source is None else call.source
            async with contextlib.aclosing(source(self, call, deadline)) as events:
                async for event in events:
                    yield event

    async def stream(
        self, call: Call, deadline: float
    ) -> AsyncGenerator[Draft | Commit | Ended, None]:
        """The block loop's events; at the deadline it ends with what it has."""
        context = self._prefixes.lease()

        def start(deliver: Deliver, cancel: threading.Event) -> None:
            options = {"drafts": call.drafts, "cache": context, **self._kept, **call.options}
            self.runtime.submit(call.prompt, deliver, cancel=cancel, **options)

        async with contextlib.aclosing(self._arrivals(start, deadline)) as events:
            async for event in events:
                if isinstance(event, Finish):
                    cached = 0 if context is None else context.cached_tokens
                    self.metrics.finished(event, cached)
                    timed_out = event.reason == "cancelled" and time.monotonic() >= deadline
                    if event.reason == "cancelled" and self.door.closing:
                        raise shutting_down()
                    yield Ended(event, cached, timed_out)
                else:
                    yield event

    async def fill(
        self, call: Call, parts: Sequence[str | Hole], seed: int, deadline: float
    ) -> Infill:
        """A text with its holes filled as an answer to the call's prompt; for a `source`."""
        names = ("temp", "sampler", "max_denoising_steps", "entropy_bound")
        options: dict[str, Any] = {n: call.options[n] for n in names if n in call.options}
        seen = isinstance(call.prompt, PreparedPrompt)
        options |= {"prompt": call.prompt if seen else call.prompt_ids, "seed": seed, **self._kept}
        model, tokenizer = self.runtime.model, self.tokenizer
        result = None

        def start(deliver: Deliver, cancel: threading.Event) -> None:
            turns = infill_turns(model, tokenizer, parts, cancel=cancel, **options)
            self.runtime.take_turns(turns, deliver, cancel)

        with self._in_time():
            async with contextlib.aclosing(self._arrivals(start, deadline)) as turns:
                async for turn in turns:
                    result = turn
        assert isinstance(result, Infill)
        return result

    async def score(self, ids: list[int], top_logprobs: int, deadline: float) -> Scores:
        """Log-probabilities of a prompt's own tokens; for a `source`."""
        result = None

        def start(deliver: Deliver, cancel: threading.Event) -> None:
            turns = prompt_score_turns(
                self.runtime.model, ids, top_logprobs=top_logprobs, cancelled=cancel.is_set
            )
            self.runtime.take_turns(turns, deliver, cancel)

        with self._in_time():
            async with contextlib.aclosing(self._arrivals(start, deadline)) as turns:
                async for turn in turns:
                    result = turn
        assert isinstance(result, Scores)
        return result

    async def read_canvas(self, call: Call, form: CanvasForm, deadline: float) -> CanvasRead:
        """One pass over a canvas after the call's prompt; for a `source`."""
        model = self.runtime.model
        context = self._prefixes.lease(whole=True) or PromptCache(model, self.settings.kv_bits)
        result = None

        def start(deliver: Deliver, cancel: threading.Event) -> None:
            turns = read_canvas_turns(model, call.prompt, form, context, cancel.is_set)
            self.runtime.take_turns(turns, deliver, cancel)

        with self._in_time():
            async with contextlib.aclosing(self._arrivals(start, deadline)) as turns:
                async for turn in turns:
                    result = turn
            if result is None:
                raise CancelledError("The read was cancelled.")
        assert isinstance(result, CanvasRead)
        return result

    async def decide(
        self,
        state: Any,
        questions: Mapping[str, Question],
        orders: int,
        hold: Callable[[int], None],
    ) -> Decision:
        """Answers to questions about a state, from single decoder passes. hold: counts the memory
        of its images."""
        deadline = time.monotonic() + self.settings.max_seconds
        access = replace(self.settings.image_access, hold=hold)
        context, ended = self._prefixes.lease(whole=True), threading.Event()
        # Texts are encoded and images fetched on a thread that holds up no reply.
        turns = await asyncio.to_thread(
            lambda: decide_turns(
                self.runtime.model,
                self.tokenizer,
                state,
                questions,
                orders=orders,
                access=access,
                cache=context,
                kv_bits=self.settings.kv_bits,
                cancel=ended,
            )
        )
        result = None

        def start(deliver: Deliver, cancel: threading.Event) -> None:
            self.runtime.take_turns(_until(turns, cancel), deliver, cancel)

        with self._in_time():
            steps = self._arrivals(start, deadline, ended)
            async with self._place(), contextlib.aclosing(steps) as arrived:
                async for step in arrived:
                    result = step
            if not isinstance(result, Decision):
                raise CancelledError("The decision was cancelled.")
        return result

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """Work cancelled inside ran out of time, or the server ends: 503."""
        try:
            yield
        except CancelledError:
            self.door.check_open()
            raise ApiError(503, "The request ran out of time; try again later.") from None

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the places on the model, waited for in order."""
        self.door.check_open()
        self._waiting += 1
        try:
            async with asyncio.timeout(self.settings.max_seconds):
                await self._places.acquire()
        except TimeoutError:
            raise ApiError(
                503, "The request waited too long for its turn; try again later.", retry_after=30
            ) from None
        finally:
            self._waiting -= 1
        try:
            self.door.check_open()
            yield
        finally:
            self._places.release()

    def report(self, error: BaseException) -> None:
        """Logs a bug with its traceback; a client's own mistakes stay out of the log."""
        if not isinstance(error, ApiError) and as_api_error(error).status >= 500:
            log.error("a request failed", exc_info=error)

    def stop(self) -> None:
        """Takes no more requests and ends every one there is, after its current denoising step,
        with 503. On the event loop."""
        self.door.closing = True
        for cancel in self._cancels:
            cancel.set()
        for _ in range(self._waiting):
            self._places.release()  # those who wait for a turn wait no longer

    def close(self) -> None:
        """After `stop`: keeps the contexts that are to be kept, and closes the runtime. Blocks."""
        if self._prefixes.disk is not None:
            written = threading.Event()

            def deliver(item: Any) -> None:
                if isinstance(item, BaseException):
                    self.report(item)
                elif item is None:
                    written.set()

            with contextlib.suppress(InputError):  # someone closed the runtime before us
                self.runtime.take_turns(self._prefixes.flush(), deliver, threading.Event())
                written.wait()
        self.runtime.close()

    async def _arrivals(
        self,
        start: Callable[[Deliver, threading.Event], None],
        deadline: float,
        cancel: threading.Event | None = None,
    ) -> AsyncGenerator[Any, None]:
        """What the model's thread delivers of the work that `start` gives it.

        The work is cancelled, by this event if it is given, when the generator is left, and at the
        deadline.
        """
        cancel = cancel or threading.Event()
        self._cancels.add(cancel)
        left = max(deadline - time.monotonic(), 0)
        out_of_time = asyncio.get_running_loop().call_later(left, cancel.set)
        try:
            arrived = arrivals(lambda deliver: start(deliver, cancel), cancel)
            async with contextlib.aclosing(arrived) as items:
                async for item in items:
                    yield item
        finally:
            out_of_time.cancel()
            cancel.set()
            self._cancels.discard(cancel)


def _until(steps: Iterable[Any], cancel: threading.Event) -> Iterator[Any]:
    """The steps up to the first after which `cancel` is set."""
    for step in steps:
        yield step
        if cancel.is_set():
            return
