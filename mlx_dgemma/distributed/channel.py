"""Messages between two processes over one socket: a JSON object, and bytes after it.

Beside MLX's collectives, which wait for ever for a process that is gone: on a socket silence has an
end. A message is 4 bytes of the object's length, 8 of the payload's, the object, the payload.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
import time
from typing import Any, NamedTuple

_SIZES = struct.Struct("<IQ")
_MOST_OBJECT = 64 << 20
_MOST_PAYLOAD = 1 << 48
_MOST_HELLO = 4096
BEAT = "beat"
_LAST = 0.5  # seconds


class Message(NamedTuple):
    """op: what is said. fields: its JSON object. payload: bytes after it."""

    op: str
    fields: dict[str, Any]
    payload: bytes


class LostError(Exception):
    """The other process is gone, or silent for too long."""


class Channel:
    """One end of a socket; any thread may send, one receives.

    A thread of the receiver calls `receive` at all times, so that `heard` is when the other end
    last showed that it lives (time.monotonic).
    """

    def __init__(self, opened: socket.socket) -> None:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setblocking(True)
        self._socket = opened
        self._sending = threading.Lock()
        self.heard = time.monotonic()

    def send(self, op: str, payload: bytes = b"", **fields: Any) -> None:
        """Raises LostError where nobody is there to receive it."""
        text = json.dumps({"op": op, **fields}).encode()
        try:
            with self._sending:
                self._socket.sendall(_SIZES.pack(len(text), len(payload)) + text)
                if payload:
                    self._socket.sendall(payload)
        except OSError as error:
            raise LostError(str(error)) from error

    def last_word(self, op: str, **fields: Any) -> None:
        """`send` for a process that ends: never waits for one that does not read."""
        if not self._sending.acquire(timeout=_LAST):
            return
        text = json.dumps({"op": op, **fields}).encode()
        with contextlib.suppress(OSError):
            self._socket.settimeout(_LAST)
            self._socket.sendall(_SIZES.pack(len(text), 0) + text)

    def receive(self, silence: float, *, unverified: bool = False) -> Message:
        """The next message that is no beat. Raises LostError at the end of the connection, and when
        nothing came for `silence` seconds.

        unverified: the other end has not shown the secret yet, so only a short message is taken."""
        most_object, most_payload = (
            (_MOST_HELLO, 0) if unverified else (_MOST_OBJECT, _MOST_PAYLOAD)
        )
        while True:
            lengths = _SIZES.unpack(self._read(_SIZES.size, silence))
            if lengths[0] > most_object or lengths[1] > most_payload:
                raise LostError("a message that is none")
            try:
                fields = json.loads(self._read(lengths[0], silence))
                op = fields.pop("op")
            except (ValueError, KeyError, AttributeError) as error:
                raise LostError("a message that is none") from error
            payload = self._read(lengths[1], silence)
            if op != BEAT:
                return Message(op, fields, payload)

    def close(self) -> None:
        self._socket.close()

    def _read(self, count: int, silence: float) -> bytes:
        found = bytearray()
        while len(found) < count:
            try:
                ready, _, _ = select.select([self._socket], [], [], silence)
                if not ready:
                    raise LostError(f"no answer for {silence:g} seconds")
                some = self._socket.recv(min(count - len(found), 1 << 20))
            except (OSError, ValueError) as error:
                raise LostError(str(error)) from error
            if not some:
                raise LostError("the connection ended")
            self.heard = time.monotonic()
            found += some
        return bytes(found)
