"""Which positions of a canvas the next step computes, and what is kept of the others.

A position rests once it is steady: its draft repeats, it was accepted in this step and the one
before, and the sample is the id that stands on the canvas already, so that the next pass would read
there what this one read. Its keys and values, draft, entropy, sample and self-conditioning stay as
they were last computed, and it takes its part in acceptance and in the stop rule with them. It is
computed again when it is no longer accepted, or when an accepted position near it is unsettled: has
lost its acceptance, changed its draft, or become less sure.

What follows a steady stop id is no text: it is neither computed nor waited for.

Counts of computed positions are rounded up to a few sizes, so that kernels and graphs stay few; the
room goes to those that have rested longest. Which positions a canvas computes depends on that
canvas alone, never on the others of its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.model.canvas_subset import CanvasKeys

# Of a canvas, the counts of positions that a pass computes: 32, 64, 96, 128, 192 and 256 of 256.
SIZES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
# Positions to both sides that an unsettled one wakes: 16 of 256.
NEAR = 1 / 16
RISE = 0.05  # nats by which an accepted position's entropy may rise without waking its neighbours

_ACCEPTED, _UNCHANGED, _ENDS = 1, 2, 4


class Marks(NamedTuple):
    """What a step says of every position, bool [b, C] each.

    accepted: it kept its sample, or its id is known. unchanged: draft and canvas are as they were.
    ends: the draft is a stop id.
    """

    accepted: np.ndarray
    unchanged: np.ndarray
    ends: np.ndarray

    @classmethod
    def unpack(cls, codes: np.ndarray) -> Marks:
        """codes: int [b, C], as `pack` made them."""
        return cls(*((codes & bit) > 0 for bit in (_ACCEPTED, _UNCHANGED, _ENDS)))


def pack(accepted: mx.array, unchanged: mx.array, ends: mx.array) -> mx.array:
    """float32 [b, C]: the marks as one number each."""
    codes = accepted * _ACCEPTED + unchanged * _UNCHANGED + ends * _ENDS
    return codes.astype(mx.float32)


def sizes(length: int) -> list[int]:
    """The counts of positions that passes over canvases of `length` positions compute."""
    return sorted({-int(-length * share // 1) for share in SIZES})


class Kept(NamedTuple):
    """Of b canvases, the last computed values of every position: [b, C] the sample int32 and the
    entropy float32 (nats), [b, C, H] the hidden states."""

    sample: mx.array
    entropy: mx.array
    hidden: mx.array


@dataclass
class ActivePositions:
    """The positions that the next step computes, for every canvas of a batch.

    rest: whether steady positions rest; else only what follows a stop id is left out.
    pinned: bool [b, C], positions whose id is known.
    accepted, entropy: bool and float32 [b, C], of the step before. steady: bool [b, C].
    rested: int64 [b, C], steps since a position was computed. end: int64 [b], the first position
        after a steady stop id; C without one.
    whole: bool [b], canvases all of whose positions are computed in every step. fallen: bool [b],
        those that go on as the reference: whole, and ended by its rule. checking: bool [b], those
        that are whole for the next step, which says whether they may be committed. due, failed:
        bool [b], what becomes checking and fallen.
    keys, kept: of all positions, as last computed.
    """

    rest: bool
    pinned: np.ndarray
    accepted: np.ndarray
    entropy: np.ndarray
    steady: np.ndarray
    rested: np.ndarray
    end: np.ndarray
    whole: np.ndarray
    fallen: np.ndarray
    checking: np.ndarray
    due: np.ndarray
    failed: np.ndarray
    keys: CanvasKeys
    kept: Kept | None = None

    @classmethod
    def initial(cls, pinned: np.ndarray, *, rest: bool, whole: bool) -> ActivePositions:
        """Before a first step, which computes everything."""
        batch, length = pinned.shape
        return cls(
            rest=rest,
            pinned=pinned,
            accepted=np.zeros(pinned.shape, dtype=bool),
            entropy=np.full(pinned.shape, np.inf, dtype=np.float32),
            steady=np.zeros(pinned.shape, dtype=bool),
            rested=np.zeros(pinned.shape, dtype=np.int64),
            end=np.full(batch, length),
            whole=np.full(batch, whole),
            fallen=np.zeros(batch, dtype=bool),
            checking=np.zeros(batch, dtype=bool),
            due=np.zeros(batch, dtype=bool),
            failed=np.zeros(batch, dtype=bool),
            keys=CanvasKeys(),
        )

    @property
    def length(self) -> int:
        return int(self.pinned.shape[1])

    @property
    def tail(self) -> np.ndarray:
        """bool [b, C]: what follows a steady stop id."""
        after = np.arange(self.length)[None] >= self.end[:, None]
        tail: np.ndarray = after & ~self.fallen[:, None]
        return tail

    def chosen(self) -> np.ndarray:
        """bool [b, C]: the positions that the next step computes."""
        tail, resting = self.tail, self._resting()
        found: np.ndarray = ~(tail | resting)
        everything: np.ndarray = self.whole | self.fallen | self.checking
        for line in range(len(found)):
            if everything[line]:
                found[line] = True
                continue
            needed = int(found[line].sum())
            room = next(size for size in sizes(self.length) if size >= needed) - needed
            # Those that rested longest first, then the tail from its beginning.
            spare = np.flatnonzero(~found[line])
            order = np.lexsort((spare, -self.rested[line, spare], tail[line, spare]))
            found[line, spare[order[:room]]] = True
        return found

    def after(self, marks: Marks, entropy: np.ndarray, computed: np.ndarray) -> None:
        """Takes in a step that computed some positions (bool [b, C]); entropy float32 [b, C]."""
        steady = marks.accepted & self.accepted & marks.unchanged
        rise = entropy - self.entropy > RISE
        unsettled = self.accepted & (~marks.accepted | ~marks.unchanged | rise)
        unsettled &= computed & ~self.pinned & ~self.tail
        woken = _near(unsettled, round(self.length * NEAR))
        self.steady = steady & ~woken
        self.end = np.where(
            (marks.ends & steady).any(axis=1),
            (marks.ends & steady).argmax(axis=1) + 1,
            self.length,
        )
        self.rested = np.where(computed, 0, self.rested + 1)
        self.accepted, self.entropy = marks.accepted, entropy
        self.checking, self.fallen = self.due, self.fallen | self.failed
        self.due, self.failed = np.zeros_like(self.due), np.zeros_like(self.failed)

    def hold_back(
        self,
        converged: np.ndarray,
        repeated: np.ndarray,
        computed: np.ndarray,
        drawn: Callable[[int], bool],
    ) -> np.ndarray:
        """bool [b]: of the canvases that would end with this step, those that go on all the same,
        because they must be checked, or because the check says so.

        repeated: bool [b], whether the draft is the one of the step before. computed: bool [b, C].
        drawn: whether the seed has a canvas checked.
        """
        self.failed = self.checking & ~(converged & repeated)
        stale = (~computed & ~self.tail).any(axis=1)
        unseen = converged & stale
        self.due = np.array([bool(one) and drawn(line) for line, one in enumerate(unseen)])
        held: np.ndarray = self.failed | self.due
        return held

    def _resting(self) -> np.ndarray:
        if not self.rest:
            return np.zeros_like(self.steady)
        unsettled = ~self.steady & ~self.pinned & ~self.tail
        exposed = self.pinned & _near(unsettled, round(self.length * NEAR))
        resting: np.ndarray = self.steady & ~exposed
        return resting

    def keep(self, going: np.ndarray) -> None:
        """Forgets the canvases for which `going` (bool [b]) is false."""
        lines = np.flatnonzero(going)
        for name in _ON_HOST:
            setattr(self, name, getattr(self, name)[lines])
        index = mx.array(lines)
        self.keys.keep(index)
        if self.kept is not None:
            self.kept = Kept(*(array[index] for array in self.kept))

    def join(self, others: ActivePositions) -> None:
        """Takes over the canvases of another batch."""
        own, more = len(self.end), len(others.end)
        self.keys.join(others.keys, own, more)
        if self.kept is not None or others.kept is not None:
            first = self.kept or _nothing(others.kept, own)
            second = others.kept or _nothing(self.kept, more)
            pairs = zip(first, second, strict=True)
            self.kept = Kept(*(mx.concatenate([one, two]) for one, two in pairs))
        for name in _ON_HOST:
            setattr(self, name, np.concatenate([getattr(self, name), getattr(others, name)]))


_ON_HOST = (
    "pinned", "accepted", "entropy", "steady", "rested", "end",
    "whole", "fallen", "checking", "due", "failed",
)  # fmt: skip


def _nothing(like: Kept | None, canvases: int) -> Kept:
    """In the place of what no pass has computed yet."""
    assert like is not None
    return Kept(*(mx.zeros((canvases, *array.shape[1:]), array.dtype) for array in like))


def _near(marked: np.ndarray, distance: int) -> np.ndarray:
    """bool [b, C]: positions at most so far from a marked one."""
    found = marked.copy()
    for shift in range(1, distance + 1):
        found[:, shift:] |= marked[:, :-shift]
        found[:, :-shift] |= marked[:, shift:]
    return found
