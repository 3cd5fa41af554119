"""Reads and parses a request's body: within limits of size, time and memory, off the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request

from mlx_dgemma.server.admission import Place, shutting_down
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.multipart import joined
from mlx_dgemma.untrusted_json import Limits, UntrustedJSONError, parse

_PATIENCE = 4  # how many times the limit a client may send before it is cut off
_SILENCE_SECONDS = 10.0
_SLOWEST = 64 << 10  # bytes per second
_PARTS = 300_000  # the ids of the longest prompt, and what surrounds them
_PART_BYTES = 128  # of a parsed value, beside its text
# Beyond U+FFFF: the bytes that such characters begin with, and their two halves as escapes.
_WIDEST = (b"\xf0", b"\xf1", b"\xf2", b"\xf3", b"\xf4", b"\\ud", b"\\uD")
# One at a time: while it is parsed, a body takes several times its size.
_parser = ThreadPoolExecutor(1, thread_name_prefix="mlx_dgemma json")


class Bodies:
    """Reads bodies of at most `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limits = Limits(size=most, parts=_PARTS)
        self._closing = False
        self._arriving: set[asyncio.Timeout] = set()

    async def read(self, request: Request, place: Place, *, forms: bool = False) -> Any:
        """The JSON value of a request's body, held in `place`.

        forms: whether it may come as a form with files.

        ApiError 415 for another content type, 413 for too much, 408 for a client that sends too
        slowly, 400 for what is not JSON, and 503 when bodies hold too much memory already.
        """
        # A browser sends this type to another origin only after asking, and CORS says no.
        whole = request.headers.get("content-type", "")
        kind = whole.partition(";")[0].strip().lower()
        form = forms and kind == "multipart/form-data"
        if kind != "application/json" and not form:
            raise ApiError(415, "The content type must be application/json.")
        if form and "origin" in request.headers:  # which it sends without asking
            raise ApiError(415, "From a browser's page the content type must be application/json.")
        received = await self._receive(request, place)
        loop = asyncio.get_running_loop()
        if form:
            place.hold(2 * len(received))
            content = bytes(received)
            return await loop.run_in_executor(_parser, joined, whole, content, self._limits)
        try:
            return await loop.run_in_executor(_parser, self._parsed, received, place)
        except UntrustedJSONError as error:
            raise ApiError(400, f"The body {error}.") from error

    def _parsed(self, received: bytearray, place: Place) -> Any:
        place.hold(_parsed_bytes(received))
        return parse(bytes(received), self._limits)

    def close(self) -> None:
        """Ends what still arrives with 503."""
        self._closing = True
        now = asyncio.get_running_loop().time()
        for timeout in self._arriving:
            timeout.reschedule(now)

    async def _receive(self, request: Request, place: Place) -> bytearray:
        received, size = bytearray(), 0
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(_SILENCE_SECONDS) as patience:
                self._arriving.add(patience)
                try:
                    async for piece in request.stream():
                        size += len(piece)
                        if size > _PATIENCE * self._most:
                            break
                        if size <= self._most:
                            place.hold(len(piece))
                            received += piece
                        if not self._closing:
                            patience.reschedule(started + _SILENCE_SECONDS + size / _SLOWEST)
                finally:
                    self._arriving.discard(patience)
        except TimeoutError:
            if self._closing:
                raise shutting_down() from None
            raise ApiError(
                408, f"The body arrived too slowly: {size} bytes so far.", close=True
            ) from None
        if size > self._most:
            # Read, though not kept: a client still sending would see a reset and no answer.
            raise ApiError(413, f"The body is larger than {self._most} bytes.", close=True)
        return received


def _parsed_bytes(text: bytearray) -> int:
    """What a JSON text's value may take: Python keeps a text in the width of its widest
    character."""
    parts = min(sum(map(text.count, b"[{,")), _PARTS)
    narrow = text.isascii() and b"\\u" not in text
    width = 4 if any(map(text.__contains__, _WIDEST)) else 1 if narrow else 2
    return width * len(text) + _PART_BYTES * parts
