"""What must hold for the answer to every request, and a run that measures it.

Requests go straight through the application, one after the other, on an event loop whose longest
pause is measured.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from mlx_dgemma.benchmark.synthetic import synthetic_model, with_layers
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.infilling import Filling, Infill
from mlx_dgemma.server import engine as engine_module
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import ServerSettings

from .conftest import Script, user

SECONDS = 10.0  # that a request may take
BLOCKED_SECONDS = 0.25  # for which the event loop may run nothing else
MEMORY = 256 << 20  # bytes that all requests together may add
CONTROL_EVERY = 50
REPLY = 'A reply.<|tool_call>call:look{q:<|"|>x<|"|>}<tool_call|>'
# (path, body, what its answer must hold) of a sound request that is sent between the others
CONTROL = ("/v1/chat/completions", json.dumps({"messages": user()}).encode(), b'"A reply."')
JSON = {"content-type": "application/json"}

App = Callable[[Any, Any, Any], Awaitable[None]]
Request = tuple[str, str, dict[str, str], bytes]  # method, path, headers, body


class Stopwatch:
    """Seconds since it was made, less those in which the machine had no processor for us.

    That is, what threads waited for one, as far as no thread of this process ran meanwhile. Where
    the system does not say how long threads waited, all seconds count.
    """

    def __init__(self) -> None:
        self._wall, self._processor, self._waited = time.monotonic(), time.process_time(), _waited()

    def seconds(self) -> float:
        wall = time.monotonic() - self._wall
        idle = max(wall - (time.process_time() - self._processor), 0)
        after = _waited()
        waited = sum(after[thread] - self._waited.get(thread, 0) for thread in after)
        return wall - min(idle, waited)


def _waited() -> dict[str, float]:
    """Seconds that each thread was ready and had no processor, where Linux says so."""
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):
            found[path.parent.name] = int(path.read_text().split()[1]) / 1e9
    return found


class Pauses:
    """The longest time, in seconds, for which an event loop ran nothing else; a context manager.

    A task asks for a turn every few milliseconds; a turn that comes late ends a pause.
    """

    _TICK = 0.005

    def __init__(self) -> None:
        self.longest = 0.0

    async def __aenter__(self) -> Pauses:
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(2 * self._TICK)  # a pause that just ended is measured too
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            watch, asked = Stopwatch(), time.monotonic()
            await asyncio.sleep(self._TICK)
            if time.monotonic() - asked - self._TICK > self.longest:
                self.longest = max(self.longest, watch.seconds() - self._TICK)


@dataclass
class Seen:
    """What came of the requests. problems: those that broke a bound. blocked: see `Pauses`."""

    statuses: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0
    blocked: float = 0.0
    memory: int = 0
    problems: list[str] = field(default_factory=list)

    def broken(self) -> list[str]:
        """Every bound that was broken."""
        found = list(self.problems)
        if self.blocked >= BLOCKED_SECONDS:
            found.append(f"the event loop stood still for {self.blocked:.2f} s")
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


async def run(
    app: App, requests: Iterable[Request], control: tuple[str, bytes, bytes] | None = CONTROL
) -> Seen:
    """Sends the requests and holds every answer to the bounds."""
    seen = Seen()
    requests = list(requests)  # made before the loop's pauses and its memory are measured
    gc.collect()
    gc.freeze()  # nor does the server pay for collecting what the tests have loaded
    before = _begin_peak()
    async with Pauses() as pauses:
        for number, (method, path, headers, body) in enumerate(requests):
            watch = Stopwatch()
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
    gc.unfreeze()
    seen.blocked = pauses.longest
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
