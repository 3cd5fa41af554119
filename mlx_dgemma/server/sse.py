"""Server-sent events: written as they come, ended when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from mlx_dgemma.server.wire import encode

T = TypeVar("T")
# Proxies and clients give up on silent connections; a comment line is no event.
HEARTBEAT_SECONDS = 15.0
HEARTBEAT = b": still here\n\n"


def data(value: Any, event: str | None = None) -> bytes:
    """One event in wire form."""
    head = f"event: {event}\n" if event else ""
    return b"%sdata: %s\n\n" % (head.encode(), encode(value))


class EventStream:
    """An ASGI response that sends `events`."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: dict[str, str] | None = None
    ) -> None:
        self._events = events
        self._endings: list[Callable[[], None]] = []
        self.headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **(headers or {}),
        }

    def when_over(self, ending: Callable[[], None]) -> None:
        """Adds something to call once when the stream is over, however it ended."""
        self._endings.append(ending)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        writing = asyncio.create_task(self._write(send, raw))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, leaving):
                task.cancel()
            results = await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._events.aclose()
            for ending in self._endings:
                ending()
        failure = results[0]
        if isinstance(failure, Exception) and not isinstance(failure, OSError):
            raise failure

    async def _write(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
        await send(start)
        upcoming = asyncio.ensure_future(anext(self._events))
        try:
            while True:
                done, _ = await asyncio.wait((upcoming,), timeout=HEARTBEAT_SECONDS)
                if not done:
                    await send({"type": "http.response.body", "body": HEARTBEAT, "more_body": True})
                    continue
                try:
                    body = upcoming.result()
                except StopAsyncIteration:
                    break
                await send({"type": "http.response.body", "body": body, "more_body": True})
                upcoming = asyncio.ensure_future(anext(self._events))
        finally:
            upcoming.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await upcoming
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves (ClientDisconnect)."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
