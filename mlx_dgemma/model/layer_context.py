"""One layer's part of the context: keys and values in buffers that grow.

Full-attention layers keep everything, sliding layers their window. What a layer may attend to is
given as segments, as `kernels.attend` reads them.
"""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx

from mlx_dgemma.kernels.attention import Segment

STEP = 256  # buffers grow to a multiple of this many positions
_MOST_SPARE = 2048  # positions that a growing full layer gets beyond what it needs now
Arrays = tuple[mx.array, ...]
# The position of the first key, and the arrays from there on; None when there are none.
Tail = tuple[int, Arrays | None]


class LayerContext:
    """Keys and values as they are, [1, kv_heads, capacity, D], of which `used` slots count.

    Slot 0 holds position `base`, so the next token's position is base + used. A canvas' own keys
    are written after the committed ones and overwritten by the next.

    window: positions that a token sees, itself included; None for all. room: positions of a canvas.
    parts: names of the buffers, which are all [1, kv_heads, capacity, ...].
    """

    parts: ClassVar[tuple[str, ...]] = ("keys", "values")

    def __init__(self, window: int | None, room: int):
        self.window = window
        self.room = room
        self.buffers: Arrays = ()
        self.base = 0
        self.used = 0
        self.expected = 0  # positions there will be soon, by `ContextCache.expect`

    @property
    def offset(self) -> int:
        return self.base + self.used

    @property
    def capacity(self) -> int:
        return self.buffers[0].shape[2] if self.buffers else 0

    @property
    def kept(self) -> int:
        """Positions that must survive a compaction."""
        return self.used if self.window is None else min(self.used, self.window - 1)

    def append(self, keys: mx.array, values: mx.array) -> list[Segment]:
        """Commit keys and values [1, kv_heads, L, D]; returns all they may attend to, themselves
        last."""
        count = keys.shape[2]
        if self.window is not None and count > self.room:
            return self._replace(keys, values)
        self._write((keys, values))
        self.used += count
        return self._span(self._first_visible(count), self.used)

    def with_canvas(self, keys: mx.array, values: mx.array) -> list[Segment]:
        """The visible context followed by a canvas' keys and values [1, kv_heads, C, D], which are
        not committed."""
        self._write((keys, values))
        return self._span(self._first_visible(), self.used + keys.shape[2])

    def visible(self) -> list[Segment]:
        """The part of the context that a canvas sees; nothing when there is none."""
        first = self._first_visible()
        return self._span(first, self.used) if first < self.used else []

    def tail(self) -> Tail:
        """What must be remembered of this moment: of a full layer, everything."""
        if not self.used:
            return self.base, None
        first = self.used - self.kept
        return self.base + first, tuple(buffer[:, :, first : self.used] for buffer in self.buffers)

    def reset(self, base: int, arrays: Arrays | None) -> None:
        """Hold exactly the positions of `arrays`, which start at `base`."""
        self.base, self.used, self.buffers = base, 0, ()
        if arrays is not None:
            self._write(arrays)
            self.used = arrays[0].shape[2]

    def _span(self, first: int, end: int) -> list[Segment]:
        keys, values = self.buffers
        return [(keys[:, :, first:end], values[:, :, first:end])]

    def _first_visible(self, own: int = 0) -> int:
        """The first slot that the oldest of the last `own` positions sees, or else a canvas."""
        return 0 if self.window is None else max(0, self.used - own - (self.window - 1))

    def _write(self, arrays: Arrays) -> None:
        """Into the slots after the used ones; they do not count yet."""
        count = arrays[0].shape[2]
        self._reserve(count, arrays)
        # Rebinding the buffer lets MLX write in place: nothing else holds the old one.
        for buffer, rows in zip(self.buffers, arrays, strict=True):
            buffer[:, :, self.used : self.used + count] = rows

    def _reserve(self, count: int, like: Arrays) -> None:
        """Room for `count` positions after the used ones, and for a canvas after those."""
        if self.used + count <= self.capacity:
            return
        kept = self.kept
        wanted = kept + count + self.room
        if self.window is None:
            wanted = max(wanted + min(kept // 8, _MOST_SPARE), self.expected + self.room)
        capacity = -(-wanted // STEP) * STEP
        old = self.buffers or (None,) * len(like)
        first = self.used - kept
        self.buffers = tuple(
            _grown(buffer, rows, first, self.used, capacity)
            for buffer, rows in zip(old, like, strict=True)
        )
        self.base += first
        self.used = kept

    def _replace(self, keys: mx.array, values: mx.array) -> list[Segment]:
        """Append a long chunk to a sliding layer: attend to all of it, keep only its end."""
        base, old = self.tail()
        if old is not None:
            keys = mx.concatenate([old[0], keys], axis=2)
            values = mx.concatenate([old[1], values], axis=2)
        assert self.window is not None
        keep = min(keys.shape[2], self.window - 1)
        first = keys.shape[2] - keep
        self.reset(base + first, (keys[:, :, first:], values[:, :, first:]))
        return [(keys, values)]


def _grown(old: mx.array | None, like: mx.array, first: int, end: int, capacity: int) -> mx.array:
    _, heads, _, dim = like.shape
    spare = mx.zeros((1, heads, capacity - (end - first), dim), like.dtype)
    return spare if old is None else mx.concatenate([old[:, :, first:end], spare], axis=2)
