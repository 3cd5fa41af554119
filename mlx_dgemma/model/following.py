"""What every rank but 0 does: pass what comes through its part of the model, as rank 0 asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.distributed.channel import Message
from mlx_dgemma.distributed.team import Follower
from mlx_dgemma.model.arrays import packed_arrays, unpacked_arrays
from mlx_dgemma.model.canvas_subset import CanvasKeys, Held, Subset
from mlx_dgemma.model.context import ContextCache, Frozen, Snapshot
from mlx_dgemma.model.network import Model
from mlx_dgemma.model.passes import Begun
from mlx_dgemma.model.shared_head import SharedHead


class Following:
    """A rank's models, contexts and logits by rank 0's numbers, and the work on them."""

    def __init__(self, team: Follower) -> None:
        self._team = team
        self.models: dict[int, Model] = {}
        self._of: dict[int, Model] = {}  # whose a context is
        self._held: dict[int, ContextCache | Snapshot | Frozen | CanvasKeys] = {}
        self._begun: dict[int, Begun] = {}  # passes that go on, by context
        self._heads: dict[int, SharedHead] = {}
        self._seen: dict[int, tuple[mx.array, mx.array]] = {}  # temperature and log_z
        self._work: dict[str, Callable[..., object]] = {
            "context": self._make,
            "forget": self._forget,
            "forget_model": self._forget_model,
            "encode": self._encode,
            "decode": self._decode,
            "decode_on": self._decode_on,
            "canvas_keys": self._make_keys,
            "keep": self._keep,
            "join": self._join,
            "expect": lambda context, count: self._context(context).expect(count),
            "snapshot": self._snapshot,
            "restore": self._restore,
            "freeze": self._freeze,
            "copy_in": self._copy_in,
            "tensors": self._tensors,
            "logits": self._logits,
            "forget_logits": self._forget_logits,
            "statistics": self._statistics,
            "signal": self._signal,
            "candidates": self._candidates,
        }

    def do(self, message: Message) -> bool:
        """Does what a message asks for; False where it is no work on a model."""
        if message.op == "take":
            self._take(message)
        elif message.op in self._work:
            self._work[message.op](**message.fields)
        else:
            return False
        return True

    def _context(self, number: int) -> ContextCache:
        found = self._held[number]
        assert isinstance(found, ContextCache)
        return found

    def _make(self, number: int, model: int, kv_bits: int | None) -> None:
        self._of[number] = self.models[model]
        self._held[number] = self._of[number].make_cache(kv_bits)

    def _forget_model(self, number: int) -> None:
        self.models.pop(number, None)
        mx.clear_cache()

    def _forget(self, number: int) -> None:
        self._of.pop(number, None)
        self._held.pop(number, None)
        self._begun.pop(number, None)

    def _encode(
        self, context: int, shape: list[int], dtype: str, blocks: list[int] | None, whole: bool
    ) -> None:
        cache, x = self._context(context), self._shared(shape, dtype)
        images = None if blocks is None else np.array(blocks)
        self._of[context].through_encoder(x, cache, images, whole=whole, dispatch=True)
        mx.eval(cache.arrays)
        mx.clear_cache()

    def _decode(
        self, context: int, shape: list[int], dtype: str, last: int, held: dict[str, Any] | None
    ) -> None:
        self._begun[context] = Begun(self._shared(shape, dtype), 0, self._held_of(held))
        self._decode_on(context, 0, last)

    def _decode_on(self, context: int, first: int, last: int) -> None:
        begun, cache = self._begun.pop(context), self._context(context)
        assert begun.layers == first
        model = self._of[context]
        through = model.through_decoder(begun, last, cache, dispatch=True)
        if last < len(model.layers):
            self._begun[context] = through

    def _held_of(self, told: dict[str, Any] | None) -> Held | None:
        if told is None:
            return None
        subset = None
        if "positions" in told:
            positions, counts = np.array(told["positions"]), np.array(told["counts"])
            subset = Subset(positions, counts, told["length"])
        return Held(self._keys(told["keys"]), subset)

    def _keys(self, number: int) -> CanvasKeys:
        found = self._held[number]
        assert isinstance(found, CanvasKeys)
        return found

    def _make_keys(self, number: int) -> None:
        self._held[number] = CanvasKeys()

    def _keep(self, number: int, lines: list[int]) -> None:
        keys = self._keys(number)
        keys.keep(mx.array(lines))
        keys.changes.clear()

    def _join(self, number: int, others: int, own: int, more: int) -> None:
        keys = self._keys(number)
        keys.join(self._keys(others), own, more)
        keys.changes.clear()

    def _shared(self, shape: list[int], dtype: str) -> mx.array:
        return self._team.share(mx.zeros(shape, getattr(mx, dtype)))

    def _snapshot(self, context: int, number: int) -> None:
        self._held[number] = self._context(context).snapshot()

    def _restore(self, context: int, number: int) -> None:
        snapshot = self._held[number]
        assert isinstance(snapshot, Snapshot)
        self._context(context).restore(snapshot)

    def _freeze(self, context: int, number: int) -> None:
        self._held[number] = self._context(context).freeze()

    def _copy_in(self, context: int, number: int) -> None:
        frozen = self._held[number]
        assert isinstance(frozen, Frozen)
        self._context(context).copy_in(frozen)

    def _tensors(self, context: int) -> None:
        described, payload = packed_arrays(self._context(context).tensors()[0])
        self._team.answer(payload, arrays=described)

    def _take(self, message: Message) -> None:
        tensors = unpacked_arrays(message.fields["arrays"], message.payload)
        self._context(message.fields["context"]).hold(tensors, message.fields["bases"])

    def _logits(
        self, number: int, model: int, shape: list[int], dtype: str, banned: list[int]
    ) -> None:
        hidden, ids = mx.zeros(shape, getattr(mx, dtype)), np.array(banned, dtype=np.int32)
        self._heads[number] = SharedHead(self.models[model], hidden, ids)

    def _forget_logits(self, number: int) -> None:
        self._heads.pop(number, None)
        self._seen.pop(number, None)

    def _statistics(self, number: int, temp: float, kept: bool) -> None:
        head = self._heads[number]
        stats, temperature = head.statistics(mx.zeros((head.rows, 3)), temp)
        if kept:
            self._seen[number] = temperature, stats.log_z

    def _signal(self, number: int, some: list[int] | None) -> None:
        self._heads[number].signal(*self._seen[number], None if some is None else np.array(some))

    def _candidates(self, number: int, rows: list[int]) -> None:
        self._heads[number].candidates(slice(*rows))


def spoken(value: Any) -> str:
    """An error's sentence, on one line."""
    return " ".join(str(value).split())[:500] or type(value).__name__
