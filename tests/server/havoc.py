"""Requests of real clients, damaged by the mutations of AFL's havoc stage.

Nothing here knows what a field means. A request begins as one that a client library sent
(`recorded_requests.jsonl`, recorded from the tests of the clients) and goes through a stack of
changes to its bytes, or to its tokens: strings, numbers and punctuation, exchanged with those of
other requests, so that more of them are still JSON.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

CORPUS = Path(__file__).with_name("recorded_requests.jsonl")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+|\s+')
_INTERESTING = (
    *(-(2**63), -(2**31), -32769, -129, -128, -1, 0, 1, 16, 32, 64, 100, 127, 128, 255, 256, 512),
    *(1000, 1024, 4096, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64),
)
_PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/v1/messages/count_tokens", "/v1/systemone"),
)
_JSON = {"content-type": "application/json"}
_LONGEST = 1 << 18


@cache
def corpus() -> tuple[tuple[str, bytes], ...]:
    """(path, body) of every recorded request."""
    lines = CORPUS.read_text().splitlines()
    return tuple((path, body.encode()) for path, body in map(json.loads, lines))


@cache
def _words() -> tuple[bytes, ...]:
    """Every token of the recorded requests: the dictionary."""
    found = {token for _, body in corpus() for token in _TOKEN.findall(body) if len(token) < 300}
    return tuple(sorted(found))


def requests(seed: int) -> Iterator[tuple[str, str, dict[str, str], bytes]]:
    """(method, path, headers, body), without an end."""
    rng = random.Random(seed)
    while True:
        path, body = rng.choice(corpus())
        if rng.random() < 0.75:
            body = _on_tokens(rng, body)
        if rng.random() < 0.2:
            body = _on_bytes(rng, body)
        if rng.random() < 0.08:
            path = rng.choice(_PATHS)
        yield "POST", path, _JSON, body[:_LONGEST]


def _on_tokens(rng: random.Random, body: bytes) -> bytes:
    tokens = _TOKEN.findall(body)
    for _ in range(1 << rng.randrange(4)):
        if not tokens:
            break
        at = rng.randrange(len(tokens))
        change = rng.choice((0, 1, 1, 2, 3, 3, 4, 4, 5, 6))
        if change == 0:
            tokens[at] = rng.choice(_words())
        elif change == 1:
            kind = tokens[at][:1] == b'"'
            same = [word for word in rng.choices(_words(), k=8) if (word[:1] == b'"') == kind]
            tokens[at] = (same or [tokens[at]])[0]
        elif change == 2:
            tokens[at] = str(rng.choice(_INTERESTING)).encode()
        elif change == 3:
            tokens[at] = _inside(rng, tokens[at])
        elif change == 4:
            other = _TOKEN.findall(rng.choice(corpus())[1])
            begin, end = _value(tokens, _any_value(rng, tokens))
            tokens[begin:end] = other[slice(*_value(other, _any_value(rng, other)))]
        elif change == 5:
            begin, end = _value(tokens, at)
            copies = rng.choice((1, 1, 3, 40))
            tokens[end:end] = (b",", *tokens[begin:end]) * copies
        else:
            begin, end = _value(tokens, at)
            del tokens[begin:end]
    return b"".join(tokens)


def _any_value(rng: random.Random, tokens: list[bytes]) -> int:
    """Where a value begins: behind a colon, which most are; a few tries."""
    for _ in range(9):
        at = rng.randrange(len(tokens))
        if (tokens[at - 1].strip() == b"" and tokens[at - 2] == b":") or tokens[at - 1] == b":":
            return at
    return rng.randrange(len(tokens))


def _value(tokens: list[bytes], at: int) -> tuple[int, int]:
    """Where the value that begins at a token ends: itself, or to its closing bracket."""
    if tokens[at] not in (b"{", b"["):
        return at, at + 1
    depth = 0
    for end in range(at, len(tokens)):
        depth += (tokens[end] in (b"{", b"[")) - (tokens[end] in (b"}", b"]"))
        if depth == 0:
            return at, end + 1
    return at, len(tokens)


def _inside(rng: random.Random, token: bytes) -> bytes:
    """A string whose text was damaged, and written as a string again; other tokens by bytes."""
    try:
        text = json.loads(token)
    except ValueError:
        return _on_bytes(rng, token)
    if not isinstance(text, str):
        return _on_bytes(rng, token)
    damaged = _on_bytes(rng, text.encode("utf-8", "surrogatepass"))
    errors = "surrogateescape" if rng.random() < 0.02 else "replace"
    return json.dumps(damaged.decode("utf-8", errors)).encode()


def _on_bytes(rng: random.Random, content: bytes) -> bytes:
    """AFL's havoc: 1 to 32 changes stacked."""
    changed = bytearray(content)
    for _ in range(1 << rng.randrange(6)):
        size = len(changed)
        at, length = rng.randrange(size + 1), _length(rng, size)
        change = rng.randrange(9)
        if change < 4 and at == size:
            continue
        if change == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            changed[at] = rng.randrange(256)
        elif change == 2:
            changed[at] = (changed[at] + rng.randint(-35, 35)) % 256
        elif change == 3:
            width = rng.choice((1, 2, 4))
            number = rng.choice(_INTERESTING) % (1 << 8 * width)
            changed[at : at + width] = number.to_bytes(width, rng.choice(("big", "little")))
        elif change == 4:
            del changed[at : at + length]
        elif change == 5 and size < _LONGEST:
            begin = rng.randrange(size + 1)
            changed[at:at] = changed[begin : begin + length]
        elif change == 6:
            begin = rng.randrange(size + 1)
            changed[at : at + length] = changed[begin : begin + length]
        elif change == 7 and size < _LONGEST:
            changed[at:at] = bytes([rng.randrange(256)]) * length
        else:
            word = rng.choice(_words())
            changed[at : at + (len(word) if rng.random() < 0.5 else 0)] = word
    return bytes(changed)


def _length(rng: random.Random, size: int) -> int:
    """How much a change takes: mostly little, seldom everything."""
    most = rng.choice((4, 4, 32, 32, 128, 1500, size))
    return rng.randint(1, max(1, min(most, size)))
