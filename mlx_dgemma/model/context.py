"""The context cache: keys and values of the committed tokens, a layer's each by itself.

Sliding layers hold little more than their window; full-attention layers grow with the context, and
can be kept in 8 bits instead of exactly. A canvas never counts as context.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_dgemma.errors import CheckpointError, InputError, ResourceError
from mlx_dgemma.files import check_replaceable, replacing
from mlx_dgemma.headers import read_header
from mlx_dgemma.model.layer_context import Arrays, LayerContext, Tail
from mlx_dgemma.model.packed_context import BITS, PackedLayerContext
from mlx_dgemma.untrusted_json import parse, shown

_FORMAT = "mlx_dgemma context 2"


class ContextOwner(Protocol):
    """What a context must know about the model that computes it."""

    def make_cache(self, kv_bits: int | None = None) -> ContextCache: ...

    def prefill(self, ids: Sequence[int], cache: ContextCache) -> None: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A moment of a context: its length, and what the sliding layers then held."""

    offset: int
    tails: tuple[Tail | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(tail) for tail in self.tails if tail is not None)


@dataclass(frozen=True, eq=False)
class Frozen:
    """A context by itself, with arrays of its own: whatever happens to the one it was taken from.

    tails: per layer, the position of its first key, and its arrays.
    """

    offset: int
    tails: tuple[Tail, ...]
    kv_bits: int | None

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self.tails))


class ContextCache:
    """The committed tokens' keys and values of one conversation (batch 1).

    windows: per layer, None where it attends to all. room: positions of a canvas.
    kv_bits: 8 packs what the layers that attend to all have committed; None keeps it exactly.
    """

    def __init__(
        self,
        windows: list[int | None],
        room: int,
        fingerprint: Callable[[], str],
        kv_bits: int | None = None,
    ):
        if kv_bits not in (None, BITS):
            raise InputError(
                f"kv_bits={kv_bits!r} is not possible: use {BITS}, or None for the exact context."
            )
        self.layers = [
            PackedLayerContext(room)
            if window is None and kv_bits is not None
            else LayerContext(window, room)
            for window in windows
        ]
        self.kv_bits = kv_bits
        self.metadata: dict[str, str] = {}
        self.fingerprint = fingerprint
        # Those that can still be restored; who took one keeps it alive, not this list of them.
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    @property
    def offset(self) -> int:
        """Committed tokens."""
        return self.layers[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, [1, kv_heads, capacity, ...] each, for evaluation."""
        return [buffer for layer in self.layers for buffer in layer.buffers]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, spare room included."""
        return sum(a.nbytes for a in self.arrays)

    def expect(self, count: int) -> None:
        """Announce `count` more tokens, so that layers which keep them all grow once, not often:
        growing holds the old buffer beside the new one."""
        for layer in self.layers:
            layer.expected = max(layer.expected, layer.offset + count)

    def snapshot(self) -> Snapshot:
        """Remember this moment. Cheap for full layers; sliding layers copy their window."""
        tails = tuple(None if layer.window is None else layer.tail() for layer in self.layers)
        tails = tuple(_copied(tail) for tail in tails)
        snapshot = Snapshot(self.offset, tails)
        self._snapshots.add(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this context.

        InputError when it belongs to another context, or when the context was since cut back
        to before the snapshot, so that the tokens it stands on are gone.
        """
        if snapshot not in self._snapshots:
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
        return Frozen(self.offset, tuple(tail for tail in tails if tail is not None), self.kv_bits)

    def copy_in(self, frozen: Frozen) -> None:
        """Hold exactly what was frozen, of this model; snapshots of before are void.

        InputError for a context of the other kind.
        """
        if frozen.kv_bits != self.kv_bits:
            raise InputError(
                f"This context was frozen with kv_bits={frozen.kv_bits}: copy it into one that was "
                "made so."
            )
        self._snapshots.clear()
        for layer, tail in zip(self.layers, frozen.tails, strict=True):
            layer.reset(*tail)

    def save(self, path: str | Path) -> None:
        """Write the context to a safetensors file; the file appears only when it is complete."""
        path = Path(path)
        check_replaceable(path)
        tensors, bases = self.tensors()
        tensors |= self.stored_elsewhere()
        header = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint(),
            "offset": str(self.offset),
            "bases": json.dumps(bases),
            "kv_bits": json.dumps(self.kv_bits),
            "metadata": json.dumps(self.metadata),
        }
        header["digest"] = _digest(tensors, header)
        try:
            with replacing(path, ".safetensors") as partial:
                partial.touch()  # MLX does not say why it cannot
                mx.save_safetensors(str(partial), tensors, header)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "the disk is probably full"
            raise ResourceError(f"The context cannot be saved to {path}: {reason}.") from error

    @classmethod
    def load(
        cls, path: str | Path, model: ContextOwner, kv_bits: int | None = None
    ) -> ContextCache:
        """Read a context that `save` wrote for this model; CheckpointError for anything else.

        One that is kept otherwise than `kv_bits` says is refused and not converted: it would go
        on differently than a context that was so from its beginning.
        """
        path = Path(path)
        tensors, header = _read(path)
        if header.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a context saved by this version of the program.")
        cache = model.make_cache(kv_bits)
        try:
            if header["fingerprint"] != model.fingerprint():
                raise CheckpointError(
                    f"{path} holds the context of another model; prefill it again."
                )
            if (stored := parse(header.get("kv_bits", "null"))) != kv_bits:
                packed = f"{shown(stored)}-bit"
                kind, way = ("exact", "without") if stored is None else (packed, "with")
                raise CheckpointError(
                    f"{path} holds an {kind} context: read it {way} kv_bits={BITS} "
                    f"(--kv-bits {BITS}), or prefill it again."
                )
            if header["digest"] != _digest(tensors, header):
                raise CheckpointError(
                    f"{path} is damaged: it does not hold what was saved; delete it and prefill "
                    "again."
                )
            bases, offset = parse(header["bases"]), int(header["offset"])
            like = _one_position(model, kv_bits)
            for index, (layer, base) in enumerate(zip(cache.layers, bases, strict=True)):
                arrays = [tensors.get(f"layers.{index}.{part}") for part in layer.parts]
                held = tuple(array for array in arrays if array is not None)
                whole = held if len(held) == len(arrays) else None
                if not _fits(layer, base, offset, whole, like.layers[index].buffers):
                    raise CheckpointError(f"{path} is incomplete; delete it and prefill again.")
                layer.reset(base, whole)
            mx.eval(cache.arrays)
            cache.hand_out(tensors, bases)
            metadata = parse(header["metadata"])
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("metadata that is no text")
            cache.metadata = dict(metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged; delete it and prefill again.") from error
        return cache

    def tensors(self) -> tuple[dict[str, mx.array], list[int]]:
        """What is remembered, by name, and the position of each layer's first key."""
        tensors: dict[str, mx.array] = {}
        bases = []
        for index, layer in enumerate(self.layers):
            base, arrays = layer.tail()
            bases.append(base)
            for part, array in zip(layer.parts, arrays or (), strict=arrays is not None):
                tensors[f"layers.{index}.{part}"] = mx.contiguous(array)
        return tensors, bases

    def hold(self, tensors: Mapping[str, mx.array], bases: Sequence[int]) -> None:
        """Holds exactly what `tensors` gave."""
        for index, (layer, base) in enumerate(zip(self.layers, bases, strict=True)):
            arrays = [tensors.get(f"layers.{index}.{part}") for part in layer.parts]
            held = tuple(array for array in arrays if array is not None)
            layer.reset(base, held if len(held) == len(arrays) else None)
        mx.eval(self.arrays)

    def stored_elsewhere(self) -> dict[str, mx.array]:
        """What other processes hold of this context, for its file (see SharedContext)."""
        return {}

    def hand_out(self, tensors: Mapping[str, mx.array], bases: list[int]) -> None:
        """Gives other processes what they held of it when it was saved."""

    def _forget_snapshots_after(self, offset: int) -> None:
        for known in list(self._snapshots):
            if known.offset > offset:
                self._snapshots.discard(known)


def _digest(tensors: Mapping[str, mx.array], header: Mapping[str, str]) -> str:
    """Of everything a file holds, the digest itself apart."""
    digest = hashlib.sha256()
    for name, text in sorted(header.items()):
        if name != "digest":
            digest.update(f"{name}={text}\n".encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name}: {array.dtype} {array.shape}\n".encode())
        digest.update(np.asarray(array.view(mx.uint8)).data)
    return digest.hexdigest()


def _nbytes(tail: Tail) -> int:
    return sum(array.nbytes for array in tail[1] or ())


def _copied(tail: Tail | None) -> Tail | None:
    """Own memory for a tail: a view would keep the buffer from being written in place."""
    if tail is None or tail[1] is None:
        return tail
    arrays = tuple(mx.contiguous(array + 0) for array in tail[1])
    mx.eval(arrays)
    return tail[0], arrays


def _one_position(model: ContextOwner, kv_bits: int | None) -> ContextCache:
    """A context of one token, whose buffers show the shapes and dtypes that this model's have."""
    like = model.make_cache(kv_bits)
    model.prefill([0], like)
    return like


def _fits(layer: LayerContext, base: Any, offset: int, held: Arrays | None, like: Arrays) -> bool:
    """Whether these arrays are a layer's context of `offset` tokens from position `base` on."""
    if isinstance(base, bool) or not isinstance(base, int) or not 0 <= base <= offset:
        return False
    count = offset - base
    if held is None:
        return count == 0
    forms = zip(held, like, strict=True)
    if not all(
        one.ndim == 4
        and one.dtype == other.dtype
        and one.shape == (1, other.shape[1], count, other.shape[3])
        for one, other in forms
    ):
        return False
    # A sliding layer keeps its window, or all there is.
    return layer.window is None or base == 0 or count >= min(offset, layer.window - 1)


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    if not os.path.exists(path):
        raise CheckpointError(
            f"{path} cannot be read as a saved context: No such file or directory."
        )
    read_header(path, "delete it and prefill again")
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        tensors, header = loaded
        mx.eval(tensors)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged; delete it and prefill again.") from error
    return tensors, header
