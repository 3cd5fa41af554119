"""Rank 0's context of a model that several processes hold: each keeps its own heads of it.

Whatever is done to this one, the others are asked to do to theirs. Contexts, snapshots and frozen
moments have numbers, which the others forget once rank 0 has.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_dgemma.distributed.team import Leader
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.arrays import packed_arrays, unpacked_arrays
from mlx_dgemma.model.canvas_subset import CanvasKeys, Held, Kept
from mlx_dgemma.model.context import ContextCache, Frozen, Snapshot

_RANK = "rank {}/"  # what another rank's tensors in a file are called before their names
_numbers = itertools.count()
_canvas_keys: weakref.WeakKeyDictionary[CanvasKeys, int] = weakref.WeakKeyDictionary()
_frozen: weakref.WeakKeyDictionary[Frozen, int] = weakref.WeakKeyDictionary()


class SharedContext(ContextCache):
    """The heads that rank 0 holds; a file of it holds those of all ranks."""

    def __init__(
        self,
        windows: list[int | None],
        slack: int,
        fingerprint: Callable[[], str],
        kv_bits: int | None,
        team: Leader,
        model: int,
    ) -> None:
        """model: the number by which the others know whose context it is."""
        super().__init__(windows, slack, fingerprint, kv_bits)
        self._team = team
        self._numbers: weakref.WeakKeyDictionary[Snapshot, int] = weakref.WeakKeyDictionary()
        self.number = next(_numbers)
        team.tell("context", number=self.number, model=model, kv_bits=kv_bits)
        weakref.finalize(self, team.later, "forget", number=self.number)

    def shared(self, x: mx.array, op: str, **fields: Any) -> mx.array:
        """Asks the others to pass x through their layers too; x as it reaches all."""
        dtype = str(x.dtype).split(".")[-1]
        self._team.tell(op, context=self.number, shape=list(x.shape), dtype=dtype, **fields)
        return self._team.share(x)

    def shared_decode(self, x: mx.array, first: int, last: int, held: Held | None) -> mx.array:
        """The same through the decoder's layers from `first` up to `last`; where it goes on, the
        others go on with what they have."""
        if first > 0:
            if first < last:  # else those that were begun were all
                self._team.tell("decode_on", context=self.number, first=first, last=last)
            return x
        told: dict[str, Any] = {}
        if held is not None:
            told["keys"] = self._tell_changes(held.keys)
            if held.subset is not None:
                told["positions"] = held.subset.positions.tolist()
                told["counts"] = held.subset.counts.tolist()
                told["length"] = held.subset.length
        return self.shared(x, "decode", last=last, held=told or None)

    def _tell_changes(self, keys: CanvasKeys) -> int:
        """Asks the others to do to theirs what was done to these keys; their number."""
        if keys not in _canvas_keys:
            number = _canvas_keys[keys] = next(_numbers)
            self._team.tell("canvas_keys", number=number)
            weakref.finalize(keys, self._team.later, "forget", number=number)
        number = _canvas_keys[keys]
        for change in keys.changes:
            if isinstance(change, Kept):
                self._team.tell("keep", number=number, lines=change.lines.tolist())
            else:
                others = self._tell_changes(change.others)
                self._team.tell(
                    "join", number=number, others=others, own=change.own, more=change.more
                )
        keys.changes.clear()
        return number

    def expect(self, count: int) -> None:
        super().expect(count)
        self._team.tell("expect", context=self.number, count=count)

    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        number = self._numbers[snapshot] = next(_numbers)
        self._team.tell("snapshot", context=self.number, number=number)
        weakref.finalize(snapshot, self._team.later, "forget", number=number)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self._team.tell("restore", context=self.number, number=self._numbers[snapshot])

    def freeze(self) -> Frozen:
        frozen = super().freeze()
        number = _frozen[frozen] = next(_numbers)
        self._team.tell("freeze", context=self.number, number=number)
        weakref.finalize(frozen, self._team.later, "forget", number=number)
        return frozen

    def copy_in(self, frozen: Frozen) -> None:
        super().copy_in(frozen)
        self._team.tell("copy_in", context=self.number, number=_frozen[frozen])

    def stored_elsewhere(self) -> dict[str, mx.array]:
        found: dict[str, mx.array] = {}
        for rank, answer in self._team.ask("tensors", context=self.number).items():
            held = unpacked_arrays(answer.fields["arrays"], answer.payload)
            found |= {_RANK.format(rank) + name: array for name, array in held.items()}
        return found

    def hand_out(self, tensors: Mapping[str, mx.array], bases: list[int]) -> None:
        for rank in range(1, self._team.size):
            prefix = _RANK.format(rank)
            own = {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}
            if self.offset and not own:
                raise CheckpointError("the heads of another rank are missing")
            described, payload = packed_arrays(own)
            self._team.tell(
                "take", payload, to=rank, context=self.number, arrays=described, bases=bases
            )
