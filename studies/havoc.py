"""AFL's havoc: bytes and JSON tokens changed at random, with no idea of what they mean.

A content goes through a stack of changes to its bytes, or to its tokens: strings, numbers and
punctuation, exchanged with those of other contents, so that more of the results are still JSON.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+|\s+')
_INTERESTING = (
    *(-(2**63), -(2**31), -32769, -129, -128, -1, 0, 1, 16, 32, 64, 100, 127, 128, 255, 256, 512),
    *(1000, 1024, 4096, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64),
)
_LONGEST = 1 << 18  # nothing grows beyond it
_LONGEST_WORD = 300


class Havoc:
    """Changes contents like those of a corpus, whose tokens are the dictionary."""

    def __init__(self, corpus: Iterable[bytes]) -> None:
        self._corpus = [_TOKEN.findall(content) for content in corpus]
        found = {token for tokens in self._corpus for token in tokens}
        self._words = sorted(word for word in found if len(word) < _LONGEST_WORD)

    def tokenwise(self, rng: random.Random, content: bytes) -> bytes:
        tokens = _TOKEN.findall(content)
        for _ in range(1 << rng.randrange(4)):
            if not tokens:
                break
            at = rng.randrange(len(tokens))
            change = rng.choice((0, 1, 1, 2, 3, 3, 4, 4, 5, 6))
            if change == 0:
                tokens[at] = rng.choice(self._words)
            elif change == 1:
                kind = tokens[at][:1] == b'"'
                same = [
                    word for word in rng.choices(self._words, k=8) if (word[:1] == b'"') == kind
                ]
                tokens[at] = (same or [tokens[at]])[0]
            elif change == 2:
                tokens[at] = str(rng.choice(_INTERESTING)).encode()
            elif change == 3:
                tokens[at] = self._inside(rng, tokens[at])
            elif change == 4:
                other = rng.choice(self._corpus)
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

    def file(self, path: Path, rng: random.Random) -> None:
        """Changes a file: JSON by tokens or bytes, safetensors in their header or anywhere."""
        content = path.read_bytes()
        path.unlink()  # it may be a link to the whole file
        by_token = rng.random() < 0.75
        if path.suffix == ".safetensors" and by_token:
            end = 8 + int.from_bytes(content[:8], "little")
            header = self.tokenwise(rng, content[8:end])
            content = len(header).to_bytes(8, "little") + header + content[end:]
        elif path.suffix == ".json" and by_token:
            content = self.tokenwise(rng, content)
        else:
            window = rng.choice((16, 600, len(content)))
            content = self.bytewise(rng, content[:window]) + content[window:]
        path.write_bytes(content)

    def _inside(self, rng: random.Random, token: bytes) -> bytes:
        """A string whose text was damaged, and written as a string again; other tokens by bytes."""
        try:
            text = json.loads(token)
        except ValueError:
            return self.bytewise(rng, token)
        if not isinstance(text, str):
            return self.bytewise(rng, token)
        damaged = self.bytewise(rng, text.encode("utf-8", "surrogatepass"))
        errors = "surrogateescape" if rng.random() < 0.02 else "replace"
        return json.dumps(damaged.decode("utf-8", errors)).encode()

    def bytewise(self, rng: random.Random, content: bytes) -> bytes:
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
                word = rng.choice(self._words)
                changed[at : at + (len(word) if rng.random() < 0.5 else 0)] = word
        return bytes(changed)


def _any_value(rng: random.Random, tokens: Sequence[bytes]) -> int:
    """Where a value begins: after a colon, which most are; a few tries."""
    for _ in range(9):
        at = rng.randrange(len(tokens))
        before = [token for token in tokens[max(at - 2, 0) : at] if not token.isspace()]
        if before[-1:] == [b":"]:
            return at
    return rng.randrange(len(tokens))


def _value(tokens: Sequence[bytes], at: int) -> tuple[int, int]:
    """Where the value that begins at a token ends: itself, or to its closing bracket."""
    if tokens[at] not in (b"{", b"["):
        return at, at + 1
    depth = 0
    for end in range(at, len(tokens)):
        depth += (tokens[end] in (b"{", b"[")) - (tokens[end] in (b"}", b"]"))
        if depth == 0:
            return at, end + 1
    return at, len(tokens)


def _length(rng: random.Random, size: int) -> int:
    """How much a change takes: mostly little, seldom everything."""
    most = rng.choice((4, 4, 32, 32, 128, 1500, size))
    return rng.randint(1, max(1, min(most, size)))
