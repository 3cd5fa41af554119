"""The Runtime as apps use it: from threads, from asyncio, cancelled, closed."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_dgemma import Commit, Finish, Runtime
from mlx_dgemma.errors import InputError, ModelNotFoundError
from mlx_dgemma.infilling import Infill, infill_turns
from mlx_dgemma.prompt.holes import Hole

QUICK: Any = {"max_denoising_steps": 2, "canvas_length": 8, "seed": 4, "empty_reply": "allow"}
PROMPT = "Reverse: abc"
LONG = "Count from 10 to 99"  # many canvases of 8


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as opened:
        yield opened


def test_threads_and_asyncio_get_the_same_events(runtime: Runtime) -> None:
    async def gather() -> list[Any]:
        return [event async for event in runtime.astream(PROMPT, max_tokens=16, **QUICK)]

    there = asyncio.run(gather())
    here = list(runtime.stream(PROMPT, max_tokens=16, **QUICK))
    ids = [[event.ids for event in events if isinstance(event, Commit)] for events in (here, there)]
    assert ids[0] == ids[1]
    assert isinstance(there[-1], Finish)
    text = "".join(event.text for event in here)
    assert runtime.generate(PROMPT, max_tokens=16, **QUICK) == text


class Turns:
    """Two jobs that begin together, and the order in which they delivered."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.begin = threading.Event()
        self.ended = threading.Semaphore(0)

    def finish(self) -> None:
        """Let both begin, and wait until both have ended."""
        self.begin.set()
        for _ in range(2):
            assert self.ended.acquire(timeout=120)


@pytest.fixture
def turns(runtime: Runtime) -> Iterator[Turns]:
    """Both wait for a job, so that neither is finished before the other has begun."""
    turns = Turns()
    waiting = threading.Thread(target=lambda: runtime.call(turns.begin.wait))
    waiting.start()
    yield turns
    turns.begin.set()
    waiting.join()


def test_requests_take_turns(runtime: Runtime, turns: Turns) -> None:
    """Two requests of several blocks each: their blocks alternate."""

    def deliver(name: str) -> Any:
        def note(event: Any) -> None:
            if isinstance(event, Commit) and event.ids:
                turns.order.append(name)
            if event is None:
                turns.ended.release()

        return note

    for name in "ab":
        cancel = _after(turns.order)
        runtime.submit(LONG, deliver(name), max_tokens=10**6, cancel=cancel, **QUICK)
    turns.finish()
    assert turns.order[:4] == ["a", "b", "a", "b"]


def _after(order: list[str]) -> threading.Event:
    """Set once six blocks were committed in all."""

    class Enough(threading.Event):
        def is_set(self) -> bool:
            return len(order) >= 6

    return Enough()


def test_errors_arrive_where_they_were_asked_for(runtime: Runtime) -> None:
    async def ask() -> None:
        async for _ in runtime.astream(PROMPT, max_tokens=0):
            pass

    with pytest.raises(InputError, match="max_tokens"):
        asyncio.run(ask())
    with pytest.raises(InputError, match="max_tokens"):
        list(runtime.stream(PROMPT, max_tokens=0))
    assert runtime.generate(PROMPT, max_tokens=4, **QUICK) is not None


def test_leaving_cancels(runtime: Runtime) -> None:
    cancel = threading.Event()
    stream = runtime.stream(PROMPT, max_tokens=10**6, cancel=cancel, **QUICK)
    next(stream)
    stream.close()
    assert cancel.is_set()
    assert runtime.call(lambda: threading.current_thread().name) == "mlx_dgemma"


def test_closing_ends_everything() -> None:
    runtime = Runtime()
    stream = runtime.stream(LONG, max_tokens=10**6, **QUICK)
    next(stream)
    runtime.close()
    runtime.close()
    *_, last = stream
    assert isinstance(last, Finish)
    assert last.reason == "cancelled"
    with pytest.raises(InputError, match="closed"):
        runtime.generate(PROMPT)


def test_a_model_that_cannot_be_loaded_says_so() -> None:
    with pytest.raises(ModelNotFoundError):
        Runtime("/no/such/folder")


def test_pinned_jobs_take_turns_too(runtime: Runtime, turns: Turns) -> None:
    """Two texts with holes at once: neither waits for the other to be finished."""

    def fill(name: str) -> None:
        def deliver(item: Any) -> None:
            turns.order.append(name)
            if isinstance(item, Infill):
                assert item.text.startswith("the ")
            elif item is None:
                turns.ended.release()

        cancel = threading.Event()
        parts = ["the ", Hole(1, 2), " sings in the ", Hole(1, 2), "."]
        options: Any = {"cancel": cancel, "seed": 1, "max_denoising_steps": 2}
        steps = infill_turns(runtime.model, runtime.tokenizer, parts, **options)
        runtime.take_turns(steps, deliver, cancel)

    fill("a")
    fill("b")
    turns.finish()
    assert turns.order[:6] == ["a", "b"] * 3
    assert turns.order.count("a") == turns.order.count("b")
