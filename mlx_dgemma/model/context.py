"""The context cache: keys and values of the committed tokens, one growing buffer per layer.

Full-attention layers keep everything. Sliding layers keep their window and some slack, so that
the newest tokens can be taken back exactly. A canvas' own keys are written behind the committed
ones and overwritten by the next; they never count as context.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_dgemma.errors import CheckpointError, InputError, ResourceError

if TYPE_CHECKING:
    from mlx_dgemma.model.network import Model

_FORMAT = "mlx_dgemma context 1"
_STEP = 256  # buffers grow to a multiple of this many positions
_MOST_SPARE = 2048  # positions that a growing full layer gets beyond what it needs now
Pair = tuple[mx.array, mx.array]


class LayerContext:
    """One layer's keys and values [1, kv_heads, capacity, D], of which `used` slots count.

    Slot 0 holds position `base`, so the next token's position is base + used.
    """

    def __init__(self, window: int | None, slack: int):
        self.window = window
        self.slack = slack
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.base = 0
        self.used = 0
        self.expected = 0  # positions there will be soon, by `ContextCache.expect`

    @property
    def offset(self) -> int:
        return self.base + self.used

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def kept(self) -> int:
        """Positions that must survive a compaction."""
        return self.used if self.window is None else min(self.used, self.window - 1 + self.slack)

    def append(self, keys: mx.array, values: mx.array) -> Pair:
        """Commit new positions; returns everything they may attend to, themselves included."""
        count = keys.shape[2]
        if self.window is not None and count > self.slack:
            return self._replace(keys, values)
        self._reserve(count, keys, values)
        self._write(keys, values)
        self.used += count
        return self._last(count if self.window is None else count + self.window - 1)

    def with_canvas(self, keys: mx.array, values: mx.array) -> Pair:
        """The visible context followed by a canvas, which is written but not committed."""
        count = keys.shape[2]
        self._reserve(count, keys, values)
        self._write(keys, values)
        first = self._first_visible()
        end = self.used + count
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def visible(self) -> Pair | None:
        """The part of the context that a canvas sees; None when there is none."""
        if self.keys is None or self.values is None or self.used == self._first_visible():
            return None
        first = self._first_visible()
        return self.keys[:, :, first : self.used], self.values[:, :, first : self.used]

    def can_end_at(self, offset: int) -> bool:
        """Whether the window in front of `offset` is still here."""
        needed = 0 if self.window is None else max(0, offset - (self.window - 1))
        return self.base <= needed and offset <= self.offset

    def tail(self) -> tuple[int, Pair | None]:
        """(base, keys and values) of what a sliding layer must remember of this moment."""
        if self.keys is None or self.values is None:
            return self.base, None
        first = self.used - self.kept
        pair = self.keys[:, :, first : self.used], self.values[:, :, first : self.used]
        return self.base + first, pair

    def reset(self, base: int, pair: Pair | None) -> None:
        """Hold exactly the positions of `pair`, which start at `base`."""
        self.base, self.used, self.keys, self.values = base, 0, None, None
        if pair is not None:
            keys, values = pair
            self._reserve(keys.shape[2], keys, values)
            self._write(keys, values)
            self.used = keys.shape[2]

    def _first_visible(self) -> int:
        return 0 if self.window is None else max(0, self.used - (self.window - 1))

    def _last(self, count: int) -> Pair:
        assert self.keys is not None
        assert self.values is not None
        first = 0 if self.window is None else max(0, self.used - count)
        return self.keys[:, :, first : self.used], self.values[:, :, first : self.used]

    def _write(self, keys: mx.array, values: mx.array) -> None:
        # Rebinding the buffer lets MLX write in place: nothing else holds the old one.
        assert self.keys is not None
        assert self.values is not None
        end = self.used + keys.shape[2]
        self.keys[:, :, self.used : end] = keys
        self.values[:, :, self.used : end] = values

    def _reserve(self, count: int, keys: mx.array, values: mx.array) -> None:
        """Room for `count` positions behind the used ones, and for a canvas behind those."""
        if self.used + count <= self.capacity:
            return
        kept = self.kept
        wanted = kept + count + self.slack
        if self.window is None:
            wanted = max(wanted + min(kept // 8, _MOST_SPARE), self.expected + self.slack)
        capacity = -(-wanted // _STEP) * _STEP
        self.keys = _grown(self.keys, keys, self.used - kept, self.used, capacity)
        self.values = _grown(self.values, values, self.used - kept, self.used, capacity)
        self.base += self.used - kept
        self.used = kept

    def _replace(self, keys: mx.array, values: mx.array) -> Pair:
        """Append a long chunk to a sliding layer: attend to all of it, keep only its end."""
        base, old = self.tail()
        if old is not None:
            keys = mx.concatenate([old[0], keys], axis=2)
            values = mx.concatenate([old[1], values], axis=2)
        assert self.window is not None
        keep = min(keys.shape[2], self.window - 1 + self.slack)
        first = keys.shape[2] - keep
        self.reset(base + first, (keys[:, :, first:], values[:, :, first:]))
        return keys, values


def _grown(old: mx.array | None, like: mx.array, first: int, end: int, capacity: int) -> mx.array:
    _, heads, _, dim = like.shape
    kept = end - first
    spare = mx.zeros((1, heads, capacity - kept, dim), like.dtype)
    return spare if old is None else mx.concatenate([old[:, :, first:end], spare], axis=2)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A moment of a context: its length, and what the sliding layers then held."""

    offset: int
    tails: tuple[tuple[int, Pair | None] | None, ...]

    @property
    def nbytes(self) -> int:
        pairs = [tail[1] for tail in self.tails if tail is not None]
        return sum(k.nbytes + v.nbytes for k, v in (pair for pair in pairs if pair is not None))


@dataclass(frozen=True, eq=False)
class Frozen:
    """A context by itself, with arrays of its own: whatever happens to the one it was taken from.

    tails: per layer, the position of its first key, and keys and values.
    """

    offset: int
    tails: tuple[tuple[int, Pair | None], ...]

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in (pair for _, pair in self.tails if pair))


class ContextCache:
    """The committed tokens' keys and values of one conversation (batch 1)."""

    def __init__(self, windows: list[int | None], slack: int, fingerprint: Callable[[], str]):
        self.layers = [LayerContext(window, slack) for window in windows]
        self.slack = slack
        self.metadata: dict[str, str] = {}
        self.fingerprint = fingerprint
        self._snapshots: list[Snapshot] = []

    @property
    def offset(self) -> int:
        """Committed tokens."""
        return self.layers[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, for evaluation."""
        return [a for layer in self.layers for a in (layer.keys, layer.values) if a is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, spare room included."""
        return sum(a.nbytes for a in self.arrays)

    def expect(self, count: int) -> None:
        """Announce `count` more tokens, so that layers which keep them all grow once, not often:
        growing holds the old buffer beside the new one."""
        for layer in self.layers:
            layer.expected = max(layer.expected, layer.offset + count)

    def trim(self, count: int) -> None:
        """Forget the last `count` tokens, exactly.

        Sliding layers remember `slack` tokens more than their window; InputError beyond that
        (use a snapshot) and when there are fewer than `count` tokens.
        """
        offset = self.offset - count
        if count < 0 or offset < 0:
            raise InputError(
                f"Cannot take back {count} tokens of a context of {self.offset}; "
                f"ask for 0 to {self.offset}."
            )
        if not all(layer.can_end_at(offset) for layer in self.layers):
            raise InputError(
                f"Cannot take back {count} tokens: sliding-window layers only keep "
                f"{self.slack} beyond their window; restore a snapshot or prefill again."
            )
        for layer in self.layers:
            layer.used -= count
        self._forget_snapshots_after(offset)

    def snapshot(self) -> Snapshot:
        """Remember this moment. Cheap for full layers; sliding layers copy their window."""
        tails = tuple(None if layer.window is None else layer.tail() for layer in self.layers)
        tails = tuple(_copied(tail) for tail in tails)
        snapshot = Snapshot(self.offset, tails)
        self._snapshots.append(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this context.

        InputError when it belongs to another context, or when the context was since cut back
        to before the snapshot, so that the tokens it stands on are gone.
        """
        if not any(snapshot is known for known in self._snapshots):
            raise InputError(
                "This snapshot is not of this context, or the tokens before it were taken back "
                "since; prefill the prompt again."
            )
        for layer, tail in zip(self.layers, snapshot.tails, strict=True):
            if tail is None:
                layer.used = snapshot.offset - layer.base
            else:
                layer.reset(*tail)
        self._forget_snapshots_after(snapshot.offset)

    def freeze(self) -> Frozen:
        """A copy of this moment that other contexts can begin from."""
        tails = [_copied(layer.tail()) for layer in self.layers]
        return Frozen(self.offset, tuple(tail for tail in tails if tail is not None))

    def thaw(self, frozen: Frozen) -> None:
        """Hold exactly what was frozen, of this model; snapshots of before are void."""
        self._snapshots = []
        for layer, (base, pair) in zip(self.layers, frozen.tails, strict=True):
            layer.reset(base, pair)

    def save(self, path: str | Path) -> None:
        """Write the context to a safetensors file; the file appears only when it is complete."""
        path = Path(path)
        tensors: dict[str, mx.array] = {}
        bases = []
        for index, layer in enumerate(self.layers):
            base, pair = layer.tail()
            bases.append(base)
            if pair is not None:
                tensors[f"layers.{index}.keys"] = mx.contiguous(pair[0])
                tensors[f"layers.{index}.values"] = mx.contiguous(pair[1])
        header = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint(),
            "offset": str(self.offset),
            "bases": json.dumps(bases),
            "metadata": json.dumps(self.metadata),
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
        try:
            mx.save_safetensors(str(partial), tensors, header)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            raise ResourceError(f"The context cannot be saved to {path}: {error}.") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> ContextCache:
        """Read a context that `save` wrote for this model; CheckpointError for anything else."""
        path = Path(path)
        tensors, header = _read(path)
        if header.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a context saved by this program.")
        cache = model.make_cache()
        if header["fingerprint"] != model.fingerprint():
            raise CheckpointError(f"{path} holds the context of another model; prefill it again.")
        bases = json.loads(header["bases"])
        for index, (layer, base) in enumerate(zip(cache.layers, bases, strict=True)):
            keys, values = (tensors.get(f"layers.{index}.{part}") for part in ("keys", "values"))
            layer.reset(base, None if keys is None or values is None else (keys, values))
        if any(layer.offset != int(header["offset"]) for layer in cache.layers):
            raise CheckpointError(f"{path} is incomplete; delete it and prefill again.")
        mx.eval(cache.arrays)
        cache.metadata = json.loads(header["metadata"])
        return cache

    def _forget_snapshots_after(self, offset: int) -> None:
        self._snapshots = [known for known in self._snapshots if known.offset <= offset]


def _copied(tail: tuple[int, Pair | None] | None) -> tuple[int, Pair | None] | None:
    """Own memory for a tail: a view would keep the buffer from being written in place."""
    if tail is None or tail[1] is None:
        return tail
    pair = mx.contiguous(tail[1][0] + 0), mx.contiguous(tail[1][1] + 0)
    mx.eval(pair)
    return tail[0], pair


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        tensors, header = loaded
        mx.eval(tensors)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a saved context: {error}.") from error
    return tensors, header
