"""A tokenizer's vocabulary as symbol strings: bytes of text, and one symbol per control token."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mlx_dgemma.prompt.tokenizer import Tokenizer

OTHER_CONTROL = 256  # a control token without a symbol of its own
CONTROLS = {"stc": 257, "etc": 258, "escape": 259}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


class Vocabulary:
    """What each id adds to a text.

    stop_ids: end it; is_stop: bool [size]. size: ids of the network, also those beyond the
    tokenizer's.
    symbols: int16, of all ids one after the other, at least one each. offsets: int32 [size + 1]
    into them; lengths: int32 [size].
    later_from: int32 [size], where each id's first character begins that begins after its second
    symbol; later: uint64 [3, size], which symbols stand from there on: a bit for each of ASCII, one
    for other characters, one for what is no character.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self.size = size
        self.stop_ids = np.array(sorted(tokenizer.stop_ids), dtype=np.int64)
        self.is_stop = np.zeros(size, dtype=bool)
        self.is_stop[self.stop_ids] = True
        named = {tokenizer.ids[name]: symbol for name, symbol in CONTROLS.items()
                 if name in tokenizer.ids}  # fmt: skip
        self._controls = {symbol: id_ for id_, symbol in named.items()}
        parts: list[bytes] = []
        lengths = np.zeros(size + 1, dtype=np.int32)
        for id_ in range(size):
            if id_ in named or id_ in tokenizer.control_ids or id_ in tokenizer.stop_ids:
                symbols = np.array([named.get(id_, OTHER_CONTROL)], dtype=np.int16)
            else:
                symbols = np.frombuffer(_bytes(tokenizer.token(id_)), np.uint8).astype(np.int16)
                if not symbols.size:
                    symbols = np.array([OTHER_CONTROL], dtype=np.int16)
            parts.append(symbols.tobytes())
            lengths[id_ + 1] = symbols.size
        self.symbols = np.frombuffer(b"".join(parts), dtype=np.int16)
        self.offsets = np.cumsum(lengths, dtype=np.int32)
        self.lengths = lengths[1:]
        self.later_from, self.later = self._later()
        is_byte = np.fromiter((tokenizer.is_byte(id_) for id_ in range(size)), bool, size)
        self._byte_ids = {int(self.symbols[self.offsets[id_]]): int(id_)
                          for id_ in np.flatnonzero(is_byte)}  # fmt: skip

    def _later(self) -> tuple[np.ndarray, np.ndarray]:
        symbols, end = self.symbols, self.offsets[1:]
        within = (symbols & 0xC0) == 0x80  # a character
        begin = np.minimum(self.offsets[:-1] + 2, end)
        for _ in range(3):
            begin += (begin < end) & within.take(begin, mode="clip")
        bits = np.zeros((3, symbols.size + 1), dtype=np.uint64)
        one, wide = np.uint64(1), symbols.astype(np.uint64)
        for part in range(2):
            mine = symbols >> 6 == part
            bits[part, :-1][mine] = one << (wide[mine] & np.uint64(63))
        bits[2, :-1] = (symbols >= 128) + (symbols >= OTHER_CONTROL)
        ends = np.stack([begin, end], axis=1).ravel()
        found = np.bitwise_or.reduceat(bits, ends, axis=1)[:, ::2]
        found[:, begin == end] = 0
        return begin.astype(np.int32), np.ascontiguousarray(found)

    def spelling(self, id_: int) -> tuple[int, ...]:
        """The symbols of one id."""
        return tuple(self.symbols[self.offsets[id_] : self.offsets[id_ + 1]].tolist())

    def beginnings(self, symbols: list[int]) -> list[int]:
        """Ids that are a beginning of the symbols, the byte token of the first included."""
        if symbols[0] >= OTHER_CONTROL:
            return [self._controls[symbols[0]]] if symbols[0] in self._controls else []
        found = [self._byte_ids[symbols[0]]] if symbols[0] in self._byte_ids else []
        text = bytes(symbol for symbol in symbols if symbol < OTHER_CONTROL)
        for length in range(1, len(text) + 1):
            try:
                spelled = text[:length].decode().replace(" ", _SPACE)
            except UnicodeDecodeError:
                continue
            id_ = self._tokenizer.id_of(spelled)
            if id_ is not None and id_ < self.size and self.spelling(id_) == tuple(text[:length]):
                found.append(id_)
        return found


def _bytes(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
