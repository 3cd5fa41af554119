"""What a picture's file asks of its decoder beside the pixels that it has.

A few kilobytes can ask for gigabytes, or for minutes, without many pixels: tiles larger than the
picture, or by the thousand, millions of comments, thousands of passes over the same pixels.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_dgemma.files import open_regular, read_bytes

# Looks that a decoder may take into a file, one at least for each of its parts, and bytes for which
# it may take one more: a GIF's data comes in pieces of 255 bytes, each of which takes two, and is
# gone through up to three times.
_LOOKS = 250_000
_BYTES_PER_LOOK = 32
_PLAIN, _MOST_PLAIN = (b"P1", b"P2", b"P3"), 16 << 20  # a PPM whose pixels are numbers in digits
_MOST_SEARCHED = 256 << 20
_ICON_SIDE = 1024
_TILE_WIDTH, _TILE_LENGTH, _SAMPLES, _BITS = 0x0142, 0x0143, 0x0115, 0x0102  # of TIFF
# What OpenJPEG keeps of a tile and of a code block, as measured.
_TILE_BYTES, _BLOCK_BYTES = 12 << 10, 400
_CODESTREAM = re.compile(rb"\xff\x4f\xff\x51")
_TILE_PART, _DATA, _CODING, _COMPONENT_CODING = 0xFF90, 0xFF93, 0xFF52, 0xFF53  # of JPEG 2000


class TooManyPartsError(Exception):
    """A file of millions of parts, each of which costs a decoder more than it weighs."""


class _Counting:
    """Counts the looks into a file of `size` bytes."""

    def __init__(self, size: int) -> None:
        self._left = _LOOKS + size // _BYTES_PER_LOOK

    def allow(self, looks: int) -> None:
        self._left += looks

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise TooManyPartsError


class _Content(_Counting, io.BytesIO):
    def __init__(self, content: bytes) -> None:
        _Counting.__init__(self, len(content))
        io.BytesIO.__init__(self, content)

    def read(self, size: int | None = -1, /) -> bytes:
        self.take()
        return io.BytesIO.read(self, size)


class _File(_Counting, io.BufferedReader):
    def __init__(self, path: Path) -> None:
        raw = open_regular(path).detach()
        _Counting.__init__(self, os.fstat(raw.fileno()).st_size)
        io.BufferedReader.__init__(self, raw)

    def read(self, size: int | None = -1, /) -> bytes:
        self.take()
        return io.BufferedReader.read(self, size)


def counted(content: bytes | Path) -> _Content | _File:
    """A picture's file, which raises TooManyPartsError when it is read in too many pieces."""
    if isinstance(content, bytes):
        file: _Content | _File = _Content(content)
        size = len(content)
    else:
        file, size = _File(content), os.path.getsize(content)
    head = file.read(2)
    file.seek(0)
    if head in _PLAIN and size > _MOST_PLAIN:
        raise TooManyPartsError
    return file


def count_scans(content: bytes | Path) -> int:
    """Scans of a JPEG; a progressive one is gone through once for each."""
    return _whole(content).count(b"\xff\xda")


def hidden_bytes(image: Any, content: bytes | Path) -> int:
    """Bytes that decoding this open image takes for what its size does not show."""
    if image.format == "ICO":
        return _of_icon(image)
    if image.format == "TIFF":
        return _of_tile(image)
    if image.format == "JPEG2000":
        whole = _whole(content)
        return max((_of_blocks(whole, found.start()) for found in _CODESTREAM.finditer(whole)),
                   default=0)  # fmt: skip
    return 0


def _whole(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else read_bytes(content, _MOST_SEARCHED)


def _of_icon(image: Any) -> int:
    """An icon's pictures have sizes of their own, beside those in its list."""
    most = 0
    for entry in image.ico.entry:
        image.ico.buf.seek(entry.offset)
        head = image.ico.buf.read(24)
        size = struct.unpack(">II", head[16:24]) if head[:4] == b"\x89PNG" else (0, 0)
        if max(size) > _ICON_SIDE:
            most = max(most, 4 * max(size) ** 2, 1 << 40)
    return most


def _of_tile(image: Any) -> int:
    """A tile is unpacked whole, and may be larger than its picture."""
    width, height, samples = (
        value if isinstance(value := image.tag_v2.get(tag, default), int) else 0
        for tag, default in ((_TILE_WIDTH, 0), (_TILE_LENGTH, 0), (_SAMPLES, 1))
    )
    bits = max((n for n in image.tag_v2.get(_BITS, (8,)) if isinstance(n, int)), default=8)
    return int(2 * width * height * samples * bits // 8)


def _of_blocks(content: bytes, at: int) -> int:
    """Bytes for the tiles and code blocks of a JPEG 2000 stream that begins at `at`."""
    try:
        size, _, *places, components = struct.unpack_from(">HH8IH", content, at + 4)
        right, bottom, left, top, width, height, tile_left, tile_top = places
        if not (width and height):
            return 0
        across = -(-max(right - tile_left, 0) // width)
        down = -(-max(bottom - tile_top, 0) // height)
        pixels = max(right - left, 0) * max(bottom - top, 0)
        blocks = max(_block_densities(content, at + 4 + size, components), default=1)
    except (struct.error, IndexError):  # cut short: the decoder will say so
        return 0
    return int(_TILE_BYTES * across * down + _BLOCK_BYTES * pixels * components * blocks)


def _block_densities(content: bytes, at: int, components: int) -> Iterator[float]:
    """Code blocks of a sample, by every header of the stream from `at` on that says so."""
    end = 0
    while at + 4 <= len(content):
        marker, size = struct.unpack_from(">HH", content, at)
        if marker == _DATA:
            if end <= at:  # the last tile, which goes on to the end
                return
            at = end
            continue
        if marker == _TILE_PART:
            end = at + struct.unpack_from(">I", content, at + 6)[0]
        elif marker in (_CODING, _COMPONENT_CODING):
            style = at + 4 if marker == _CODING else at + (5 if components < 257 else 6)
            coding = style + (5 if marker == _CODING else 1)
            levels, wide, high = content[coding : coding + 3]
            whole = content[coding + 5 : coding + 6 + levels] if content[style] & 1 else b""
            precincts = whole or b"\xff" * (levels + 1)
            density, share = 0.0, 0.75  # of the samples, at the finest of the levels
            for side in reversed(precincts):  # a precinct divides code blocks
                sides = (min(wide + 2, max((side & 15) - 1, 0)),
                         min(high + 2, max((side >> 4) - 1, 0)))  # fmt: skip
                density += share / (1 << sum(sides))
                share /= 4
            yield density
        elif marker < 0xFF00:
            return
        at += 2 + size
