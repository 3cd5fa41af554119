"""Bytes that no HTTP library sends get an answer, and disturb nobody."""

import contextlib
import json
import socket
import zlib

import httpx2
import pytest

from .conftest import Script, user
from .test_clients import running

BODY = json.dumps({"messages": user()}).encode()
START = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
)
FORM = b"POST /v1/systemone HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; "
CHUNKED = b"transfer-encoding: chunked\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n"


def chunks(size: int) -> bytes:
    parts = [BODY[i : i + size] for i in range(0, len(BODY), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def with_length(start: bytes, body: bytes) -> bytes:
    return start + b"content-length: %d\r\n\r\n" % len(body) + body


CASES = {
    "in chunks": (START + CHUNKED + b"\r\n" + chunks(1), 200),
    "trailers": (START + CHUNKED + b"\r\n" + chunks(9)[:-2] + b"x-a: b\r\n" * 999 + b"\r\n", 200),
    "no size": (START + CHUNKED + b"\r\nzz\r\n" + BODY, 400),
    "negative size": (START + CHUNKED + b"\r\n-5\r\nabcde\r\n0\r\n\r\n", 400),
    "two lengths": (START + b"content-length: 5\r\n" + CHUNKED + b"\r\n" + chunks(9), 400),
    "two that differ": (START + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef", 400),
    "signed length": (START + b"content-length: +5\r\n\r\nabcde", 400),
    "endless length": (START + b"content-length: " + b"9" * 30 + b"\r\n\r\nabcde", 400),
    "other encoding": (START + b"transfer-encoding: gzip, chunked\r\n\r\n" + chunks(9), 400),
    "compressed": (with_length(START, zlib.compress(b" " * 10**7)), 400),
    "utf-16": (with_length(START, BODY.decode().encode("utf-16")), 400),
    "websocket": (GET + b"upgrade: websocket\r\nconnection: upgrade\r\n\r\n\x81\xff\xff", 200),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), 400),
    "two hosts": (GET + b"host: other\r\n\r\n", 400),
    "half an address": (b"GET /health HTTP/1.1\r\nhost: [::1\r\n\r\n", 400),
    "another's address": (b"GET http://[::1/health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 404),
    "CONNECT": (b"CONNECT a:1 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 404),
    "path": (b"GET /v1/responses/%00%zz%c0%af HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 404),
    "long path": (b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 400),
    "null": (GET + b"x: \0\r\n\r\n", 400),
    "lone CR": (GET + b"x: a\rb: c\r\n\r\n", 400),
    "large header": (GET + b"x: " + b"a" * 10**6 + b"\r\n\r\n", 400),
    "Latin key": (with_length(START + b"authorization: Bearer \xff\r\n", b"{}"), 400),
    "odd origin": (with_length(START + b"origin: \xff://[\r\n", b"{}"), 400),
    "no boundary": (with_length(FORM + b"a=b\r\n", b"abc"), 422),
    "odd boundary": (with_length(FORM + b'boundary="\xff\r\n', b'--"--'), 422),
    "form in form": (with_length(FORM + b"boundary=x\r\n", b"--x\r\ncontent-type: multipart/mixed; "
                                 b"boundary=y\r\n\r\n" * 2000 + b"--x--"), 422),
    "many parts": (with_length(FORM + b"boundary=x\r\n", b"--x\r\ncontent-disposition: form-data; "
                               b'name="a"\r\n\r\n\r\n' * 20_000 + b"--x--"), 422),
}  # fmt: skip


def status(url: str, sent: bytes) -> int:
    """Of the first answer; the connection must end or answer within seconds."""
    at = httpx2.URL(url)
    with socket.create_connection((at.host, at.port), timeout=30) as connection:
        with contextlib.suppress(OSError):  # refused before it was read to the end
            connection.sendall(sent)
        received = connection.recv(1 << 16)
    return int(received.split(b" ", 2)[1])


def test_raw_bytes_get_an_answer_and_disturb_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with running(Script("A reply."), prefix_cache_bytes=0) as url:
        found = {name: status(url, sent) for name, (sent, _) in CASES.items()}
        answer = httpx2.post(f"{url}/v1/chat/completions", json={"messages": user()}, timeout=30)
    assert found == {name: expected for name, (_, expected) in CASES.items()}
    assert answer.json()["choices"][0]["message"]["content"] == "A reply."
    assert "Traceback" not in caplog.text
