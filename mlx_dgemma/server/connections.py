"""Connections with deadlines: who sends no request, reads no answer or comes too often is let go.

uvicorn bounds idle connections and the size of headers; it bounds neither the time a client takes
for its headers or for reading an answer, nor how many connections one address opens.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_dgemma.server.wire import encode

HEADER_SECONDS = 10.0  # for the headers of a request
WRITE_SECONDS = 30.0  # in which a client must take 48 KB of an answer
GRACE_SECONDS = 30  # for the running denoising step when the server ends
MOST_FROM_ONE_ADDRESS = 64  # fewer than requests may wait: one client cannot fill the queue
MOST_CONNECTIONS = 200  # with files and sockets of its own within the 256 that macOS grants


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with deadlines and a cap on connections per address."""

    _from: ClassVar[Counter[str]] = Counter()  # per process: there is one server in it

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._deadline: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._address: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        crowded = self._from[address] >= MOST_FROM_ONE_ADDRESS
        if crowded or len(self.connections) > MOST_CONNECTIONS:
            what = "This address has" if crowded else "This server has"
            self._refuse(f"{what} too many open connections; close some.")
            return
        self._address = address
        self._from[address] += 1
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address is not None:
            self._from[self._address] -= 1
            if not self._from[self._address]:
                del self._from[self._address]
            self._address = None
        self._forget(self._deadline)
        self._forget(self._writing)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        waiting = self._between_requests
        super().data_received(data)
        if not self._between_requests:
            self._forget(self._deadline)
            self._deadline = None
        elif waiting and self._deadline is None:
            self._expect_headers()  # the first bytes of the next request

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget(self._writing)
        self._writing = None

    def shutdown(self) -> None:
        """Called when the server ends: a client that reads nothing is not waited for."""
        super().shutdown()
        if self.flow.write_paused:
            self.transport.abort()

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _refuse(self, why: str) -> None:
        error = {"message": why, "type": "rate_limit_error", "param": None, "code": "connections"}
        body = encode({"error": error})
        head = (
            "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nretry-after: 5\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    @staticmethod
    def _forget(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """The complaint about what is no HTTP, as JSON; nothing once an answer has begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        error = {"message": msg, "type": "invalid_request_error", "param": None, "code": None}
        body = encode({"error": error})
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """A server that ends its replies at the first signal, and not when it was told to wait.

    stop: called on the event loop when Ctrl-C or a request to end arrives.
    """

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = stop
        self._loop: asyncio.AbstractEventLoop | None = None
        self.interrupted = False

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal does not wait for the running step."""
        self.interrupted = True
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop)


def configure(app: Any) -> uvicorn.Config:
    """uvicorn's settings for `Server`."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=GRACE_SECONDS,
        backlog=128,
    )
