"""The canvases of a batch that are still being denoised: one line of every array for each.

Rows start together or join later; each has its own place in the schedule, its own draws, pins and
count of repeated drafts, so a row computes in a batch what it computes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.active_positions import ActivePositions
from mlx_dgemma.decoding.canvas import CanvasRequest, PinArrays, pinned_positions, stack_pins
from mlx_dgemma.decoding.draws import Place
from mlx_dgemma.decoding.settings import DecodingSettings, PositionsRule
from mlx_dgemma.decoding.temperature import temperature
from mlx_dgemma.model.canvas_subset import Held, Subset

if TYPE_CHECKING:
    from mlx_dgemma.model.passes import Begun

_NO_TOKEN = -1  # the draft before a row's first step: equal to no draft


@dataclass
class CanvasState:
    """The rows still being denoised; every field has one entry or line for each.

    rows: the caller's number of the row. requests: what was asked of it. starts: the place of its
        fresh canvas. remaining: int64 [b], steps until the schedule ends; the next step is the
        schedule's step of that number. taken: int64 [b], steps done. repeats: int64 [b], how many
        previous drafts in a row the draft equals.
    canvas: int32 [b, C], what the next step denoises. draft: int32 [b, C] of the step before, -1
        before the first. settled: int32 [b, C], the step that last changed the draft.
        revealed: bool [b, C], positions that stay as they are (confidence-threshold).
    pins: ids int32 [b, C] and mask bool [b, C], or None. pinned: the mask on the host. signal:
        [b, C, H], the self-conditioning of the next step; None before any row's first. begun: that
        step's first layers, if the device has them already.
    least_entropy: nats, of the surest free position of the step before; 0 before the first.
    active: what is computed of each canvas, and kept of the rest; None where all is. computed:
        for each row, the positions computed in each step so far.
    """

    rows: list[int]
    requests: list[CanvasRequest]
    starts: list[Place]
    remaining: np.ndarray
    taken: np.ndarray
    repeats: np.ndarray
    canvas: mx.array
    draft: mx.array
    settled: mx.array
    revealed: mx.array
    pins: PinArrays | None
    pinned: np.ndarray
    computed: list[tuple[int, ...]]
    active: ActivePositions | None = None
    signal: mx.array | None = None
    begun: Begun | None = None
    least_entropy: float = 0.0

    @classmethod
    def initial(
        cls,
        requests: Sequence[CanvasRequest],
        start: Place,
        length: int,
        vocab_size: int,
        steps: int,
        *,
        first_row: int = 0,
        positions: PositionsRule = "all",
    ) -> CanvasState:
        """Rows that begin together, numbered from `first_row`; `steps` is the schedule's N.

        positions: see DecodingSettings.
        """
        count = len(requests)
        pins = stack_pins(requests, length)
        first = [steps if one.start is None else one.start.first_step(steps) for one in requests]
        return cls(
            rows=list(range(first_row, first_row + count)),
            requests=list(requests),
            starts=[start] * count,
            remaining=np.array(first, dtype=np.int64),
            taken=np.zeros(count, dtype=np.int64),
            repeats=np.zeros(count, dtype=np.int64),
            canvas=mx.stack([request.initial(start, length, vocab_size) for request in requests]),
            draft=mx.full((count, length), _NO_TOKEN, dtype=mx.int32),
            settled=mx.zeros((count, length), dtype=mx.int32),
            revealed=mx.zeros((count, length), dtype=mx.bool_) if pins is None else pins[1],
            pins=pins,
            pinned=(pinned := pinned_positions(requests, length)),
            computed=[()] * count,
            active=None if positions == "all" else _active(requests, pinned, positions),
        )

    @property
    def places(self) -> list[Place]:
        """Where the draws of the step that comes next happen; its first step is 1."""
        return [
            start._replace(step=int(taken) + 1)
            for start, taken in zip(self.starts, self.taken, strict=True)
        ]

    @property
    def held(self) -> Held | None:
        """What the next step computes of the canvases, and where it keeps that; None where it is
        everything, and nothing is kept."""
        if self.active is None:
            return None
        return Held(self.active.keys, Subset.of(self.active.chosen()))

    @property
    def last(self) -> np.ndarray:
        """bool [b]: the step that comes next is the schedule's last."""
        last: np.ndarray = self.remaining == 1
        return last

    def temperature(self, settings: DecodingSettings) -> float | mx.array:
        """T of the step that comes next: one number, or float32 [b * C] where rows differ."""
        n, t_min, t_max = settings.max_denoising_steps, settings.t_min, settings.t_max
        first = int(self.remaining[0])
        if (self.remaining == first).all():
            return temperature(first, n, t_min, t_max)
        each = [temperature(int(step), n, t_min, t_max) for step in self.remaining]
        return mx.array(np.repeat(np.array(each, dtype=np.float32), self.canvas.shape[1]))

    def settled_after(self, draft: mx.array) -> mx.array:
        """`settled` int32 [b, C], once the step that comes next has the draft int32 [b, C]."""
        step = int(self.taken[0]) + 1
        if (self.taken == self.taken[0]).all():
            return mx.where(draft != self.draft, step, self.settled)
        steps = mx.array((self.taken + 1).astype(np.int32))[:, None]
        return mx.where(draft != self.draft, steps, self.settled)

    def keep(self, going: np.ndarray) -> None:
        """Forgets the rows for which `going` (bool [b]) is false."""
        if going.all():
            return
        lines = np.flatnonzero(going)
        self.begun = None
        self.rows = [self.rows[line] for line in lines]
        self.requests = [self.requests[line] for line in lines]
        self.starts = [self.starts[line] for line in lines]
        self.remaining, self.taken = self.remaining[lines], self.taken[lines]
        self.repeats = self.repeats[lines]
        self.computed = [self.computed[line] for line in lines]
        if self.active is not None:
            self.active.keep(going)
        index = mx.array(lines)
        self.canvas, self.draft = self.canvas[index], self.draft[index]
        self.settled, self.revealed = self.settled[index], self.revealed[index]
        self.pins = None if self.pins is None else (self.pins[0][index], self.pins[1][index])
        self.pinned = self.pinned[lines]
        self.signal = None if self.signal is None else self.signal[index]

    def join(self, others: CanvasState) -> None:
        """Takes over the rows of another state; all canvases have one length."""
        self.pins = _join_pins(self, others)
        self.pinned = np.concatenate([self.pinned, others.pinned])
        self.least_entropy = min(self.least_entropy, others.least_entropy)
        self.signal, self.begun = _join_signals(self, others), None
        self.rows = self.rows + others.rows
        self.requests = self.requests + others.requests
        self.starts = self.starts + others.starts
        self.remaining = np.concatenate([self.remaining, others.remaining])
        self.taken = np.concatenate([self.taken, others.taken])
        self.repeats = np.concatenate([self.repeats, others.repeats])
        self.computed = self.computed + others.computed
        if self.active is not None and others.active is not None:
            self.active.join(others.active)
        self.canvas = mx.concatenate([self.canvas, others.canvas])
        self.draft = mx.concatenate([self.draft, others.draft])
        self.settled = mx.concatenate([self.settled, others.settled])
        self.revealed = mx.concatenate([self.revealed, others.revealed])


def _active(
    requests: Sequence[CanvasRequest], pinned: np.ndarray, positions: PositionsRule
) -> ActivePositions:
    """A constraint reads the distributions of whole canvases, so beside one nothing rests."""
    whole = any(request.held for request in requests)
    return ActivePositions.initial(pinned, rest=positions == "active", whole=whole)


def _join_pins(some: CanvasState, others: CanvasState) -> PinArrays | None:
    if some.pins is None and others.pins is None:
        return None
    pairs = [
        one.pins or (mx.zeros_like(one.canvas), mx.zeros(one.canvas.shape, dtype=mx.bool_))
        for one in (some, others)
    ]
    return mx.concatenate([ids for ids, _ in pairs]), mx.concatenate([mask for _, mask in pairs])


def _join_signals(some: CanvasState, others: CanvasState) -> mx.array | None:
    """A row without a signal gets zeros, which the network adds as it adds none."""
    given = some.signal if some.signal is not None else others.signal
    if given is None:
        return None
    width, dtype = given.shape[-1], given.dtype
    return mx.concatenate(
        [
            mx.zeros((*one.canvas.shape, width), dtype) if one.signal is None else one.signal
            for one in (some, others)
        ]
    )
