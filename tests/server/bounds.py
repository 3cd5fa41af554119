"""What must hold for the answer to every request, and a run that measures it.

Requests go straight through the application, one after the other, on an event loop whose pauses
are measured. A busy machine makes pauses, too: what was done in a long one is done again, alone in
a new process, and counts as often as it takes long there.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import resource
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from mlx_dgemma.benchmark.synthetic import with_layers
from mlx_dgemma.checkpoint.random_weights import synthetic_model
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.infilling import Filling, Infill
from mlx_dgemma.server import engine as engine_module
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import ServerSettings

from .conftest import Script, user
from .pauses import Pause, Pauses, Stopwatch, Waits, one_processor

SECONDS = 10.0  # that a request may take
BLOCKED_SECONDS = 0.25  # for which the event loop may run nothing else
MEMORY = 256 << 20  # bytes that all requests together may add
REPEATS = 3  # of what was done in a long pause, alone
CONTROL_EVERY = 50
REPLY = 'A reply.<|tool_call>call:look{q:<|"|>x<|"|>}<tool_call|>'
# (path, body, what its answer must hold) of a sound request that is sent between the others
CONTROL = ("/v1/chat/completions", json.dumps({"messages": user()}).encode(), b'"A reply."')
JSON = {"content-type": "application/json"}

App = Callable[[Any, Any, Any], Awaitable[None]]
Request = tuple[str, str, dict[str, str], bytes]  # method, path, headers, body
Control = tuple[str, bytes, bytes]
Make = Callable[[], AbstractContextManager[App]]


@dataclass
class Seen:
    """What came of the requests.

    problems: those that broke a bound. pauses: the long ones, and what was done in them. blocked:
    the longest pause that was noted or was not.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0
    blocked: float = 0.0
    memory: int = 0
    problems: list[str] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)

    def broken(self) -> list[str]:
        """Every bound that was broken."""
        found = list(self.problems)
        for pause in self.pauses:
            if pause.certain >= BLOCKED_SECONDS:
                found.append(f"the event loop stood still for {pause.certain:.2f} s: {pause.doing}")
        if self.memory >= MEMORY:
            found.append(f"{self.memory >> 20} MB more than before")
        return found

    def __str__(self) -> str:
        return (
            f"{self.statuses.total()} requests: {dict(sorted(self.statuses.items()))}, slowest "
            f"{self.slowest:.2f} s, loop blocked {self.blocked:.3f} s, {self.memory >> 20} MB"
        )


@contextmanager
def scripted_model() -> Iterator[Script]:
    """A model whose replies are always `REPLY`, and whose decisions are those of random weights."""

    def filled(_m: Any, _t: Any, parts: Any, **_: Any) -> Iterator[Any]:
        text = "".join(part if isinstance(part, str) else "1" for part in parts)
        yield Infill(text, (Filling("1", (0, 1), 1, ()),), 0.0, 0, 1, True, 1)

    script = Script(REPLY)
    script.model = _small_model()
    # What the script remembers of its requests is not the server's memory.
    script.seen = deque(maxlen=4)  # type: ignore[assignment]
    with mock.patch.object(engine_module, "infill_turns", filled):
        yield script


@contextmanager
def scripted_app(**settings: Any) -> Iterator[App]:
    """The server's application over `scripted_model`."""
    with scripted_model() as script:
        yield create_app(script, ServerSettings(**{"prefix_cache_bytes": 0, **settings}))


@cache
def _small_model() -> Any:
    """The demo's vocabulary on one narrow layer with random weights: it decides and sees."""
    raw = with_layers(json.loads((CHECKPOINT / "config.json").read_text()), 1)
    raw["text_config"] |= {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    return synthetic_model(raw)


async def ask(
    app: App, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, bytes]:
    """(status, body) of one request, straight through the application."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http",
        "query_string": b"", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 9), "state": {},
        "headers": [(b"host", b"127.0.0.1"),
                    *((k.encode(), v.encode("utf-8", "replace")) for k, v in headers.items())],
    }  # fmt: skip
    sent = [{"type": "http.request", "body": body, "more_body": False}]
    over = asyncio.Event()
    status, content = 0, bytearray()

    async def receive() -> Any:
        if sent:
            return sent.pop()
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        content.extend(message.get("body", b""))

    await app(scope, receive, send)
    over.set()
    return status, bytes(content)


def check(
    make: Make,
    requests: Iterable[Request],
    control: Control | None = CONTROL,
    noted: float = BLOCKED_SECONDS,
    repeat: Callable[[Make, Sequence[Request]], float] | None = None,
) -> Seen:
    """Sends the requests to a new application and holds every answer to the bounds.

    noted: how long a pause must be for what was done in it to be done again. repeat: how that is
    done, in a process of its own if it is not given.
    """
    requests = list(requests)  # made before the loop's pauses and its memory are measured
    with make() as app, one_processor():
        seen = asyncio.run(_run(app, requests, control, noted))
    seen.pauses = [_judged(make, requests, pause, repeat or alone) for pause in seen.pauses]
    return seen


def _judged(
    make: Make,
    requests: Sequence[Request],
    pause: Pause,
    repeat: Callable[[Make, Sequence[Request]], float],
) -> Pause:
    """A pause with what the same requests took alone, until they were quick once."""
    first, last = pause.doing
    held = [repeat(make, requests[first : last + 1])]
    while len(held) < REPEATS and min(held) >= BLOCKED_SECONDS:
        held.append(repeat(make, requests[first : last + 1]))
    about = tuple((path, body[:300]) for _, path, _, body in requests[first : last + 1])
    return replace(pause, doing=about, alone=tuple(held))


def alone(make: Make, requests: Sequence[Request]) -> float:
    """Seconds of the longest pause while a new process does nothing but these."""
    spawn = multiprocessing.get_context("spawn")  # MLX has threads, which a fork would lose
    answers = spawn.SimpleQueue()
    process = spawn.Process(target=_answer_alone, args=(make, list(requests), answers))
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode
    longest: float = answers.get()
    return longest


def _answer_alone(make: Make, requests: list[Request], answers: Any) -> None:
    answers.put(longest_pause(make, requests))


def longest_pause(make: Make, requests: Sequence[Request]) -> float:
    """Seconds of the longest pause in these, after one sound request."""
    with make() as app, one_processor():
        return asyncio.run(_longest_pause(app, requests))


async def _longest_pause(app: App, requests: Sequence[Request]) -> float:
    await ask(app, "POST", CONTROL[0], JSON, CONTROL[1])
    gc.collect()
    gc.freeze()
    async with Pauses(BLOCKED_SECONDS) as pauses:
        for request in requests:
            with suppress(Exception):
                await ask(app, *request)
    gc.unfreeze()
    return pauses.longest


async def _run(
    app: App, requests: Sequence[Request], control: Control | None, noted: float
) -> Seen:
    seen, number = Seen(), 0
    gc.collect()
    gc.freeze()  # nor does the server pay for collecting what the tests have loaded
    before, waits = _begin_peak(), Waits()
    async with Pauses(noted, lambda: number) as pauses:
        for number, (method, path, headers, body) in enumerate(requests):
            watch = Stopwatch(waits)
            try:
                status, answer = await ask(app, method, path, headers, body)
            except Exception as error:
                status, answer = 599, repr(error).encode()
            took = watch.seconds()
            seen.slowest = max(seen.slowest, took)
            seen.statuses[status] += 1
            wrong = _wrong(method, status, answer) or (f"{took:.1f} s" if took > SECONDS else "")
            if wrong:
                seen.problems.append(f"{number} {method} {path}: {wrong}: {body[:2000]!r}")
            if control is not None and number % CONTROL_EVERY == 0:
                path, sound, held = control
                status, answer = await ask(app, "POST", path, JSON, sound)
                if status != 200 or held not in answer:
                    seen.problems.append(f"after {number}: a sound request got {status} {answer!r}")
    waits.close()
    gc.unfreeze()
    seen.pauses, seen.blocked = pauses.found, pauses.longest
    seen.memory = _peak() - before
    return seen


def _wrong(method: str, status: int, answer: bytes) -> str:
    """What is wrong with an answer; empty for a right one."""
    if status == 200:
        if b"\ndata: " in answer or answer.startswith((b"data: ", b"event: ")):
            events = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: {")]
            return "" if all(_is_json(event) for event in events) else "an event that is no JSON"
        return "" if _is_json(answer) else "no JSON"
    if not 400 <= status < 500:
        return f"status {status} {answer[:300]!r}"
    if method == "HEAD":
        return ""
    if not _is_json(answer):
        return f"an error that is no JSON: {answer[:300]!r}"
    told = json.loads(answer)
    message = told["error"]["message"] if "error" in told else str(told["detail"])
    return "" if message else "an error without a sentence"


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content.decode("utf-8"), parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return False
    return True


def _begin_peak() -> int:
    """Bytes of this process now; `_peak` counts from here where Linux can be told to."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return _peak()


def _peak() -> int:
    with suppress(OSError):
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kilobytes) << 10
