"""Which positions of a denoised canvas stay, and what the next canvas holds.

A sampler is made for one block's batch. It gets one step's statistics and answers with the
next canvas; nothing is read by the host but `status`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels.accept import Accepted, accept_renoise


class StepInput(NamedTuple):
    """One denoised canvas. All [b, C]; previous_draft is None on a block's first step."""

    canvas: mx.array
    entropy: mx.array
    draft: mx.array
    sample: mx.array
    sample_probability: mx.array
    fresh: mx.array
    previous_draft: mx.array | None
    pinned: mx.array | None


class Decision(NamedTuple):
    """The sampler's answer.

    canvas int32 [b, C]: what the next step denoises. accepted bool [b, C].
    status float32 [b, 3]: draft repeated (0 or 1), mean entropy (nats), all finite (0 or 1).
    complete: bool [b] when the sampler itself can finish a row, or None.
    """

    canvas: mx.array
    accepted: mx.array
    status: mx.array
    complete: mx.array | None = None


class Sampler(Protocol):
    """Accepts and renoises; may remember something of each row between steps."""

    def decide(self, step: StepInput, *, last: bool) -> Decision:
        """`last` is True on the schedule's final step."""

    def keep(self, rows: mx.array) -> None:
        """Forgets all rows but these (indices int32 [n])."""


class EntropyBoundSampler:
    """The reference: keep the surest positions while their joint entropy stays within a bound.

    Decided anew at every step; nothing freezes. Source: arXiv 2505.24857.
    """

    def __init__(self, settings: DecodingSettings) -> None:
        self.entropy_bound = settings.entropy_bound

    def decide(self, step: StepInput, *, last: bool) -> Decision:
        chosen = _accept(step, self.entropy_bound)
        return Decision(chosen.canvas, chosen.accepted, chosen.status)

    def keep(self, rows: mx.array) -> None:
        """Nothing to forget."""


class ConfidenceThresholdSampler:
    """mlx-vlm's default: a position whose token is probable enough is revealed and stays.

    At least the surest hidden position is revealed per step, and all of them at the last. A
    row is complete when all its positions are revealed and none of them only because the steps
    ran out.
    """

    def __init__(self, settings: DecodingSettings) -> None:
        self.threshold = settings.reveal_threshold
        self.revealed: mx.array | None = None

    def decide(self, step: StepInput, *, last: bool) -> Decision:
        if self.revealed is None:
            nothing = mx.zeros(step.canvas.shape, dtype=mx.bool_)
            self.revealed = nothing if step.pinned is None else step.pinned
        hidden = mx.logical_not(self.revealed)
        sure = self._surest(step.sample_probability, hidden)
        complete = mx.logical_or(self.revealed, sure).all(axis=1)
        reveal = hidden if last else sure
        tokens = mx.where(reveal, step.sample, step.canvas)
        self.revealed = mx.logical_or(self.revealed, reveal)
        canvas = mx.where(self.revealed, tokens, step.fresh)
        return Decision(canvas, reveal, _accept(step, 0.0).status, complete)

    def keep(self, rows: mx.array) -> None:
        if self.revealed is not None:
            self.revealed = self.revealed[rows]

    def _surest(self, probability: mx.array, hidden: mx.array) -> mx.array:
        sure = mx.logical_and(hidden, probability >= self.threshold)
        best = mx.where(hidden, probability, -1.0).argmax(axis=1, keepdims=True)
        forced = mx.arange(hidden.shape[1])[None] == best
        none_sure = mx.logical_not(sure.any(axis=1, keepdims=True))
        return mx.logical_and(hidden, mx.logical_or(sure, mx.logical_and(forced, none_sure)))


def _accept(step: StepInput, entropy_bound: float) -> Accepted:
    return accept_renoise(
        step.canvas,
        step.entropy,
        step.draft,
        step.sample,
        step.fresh,
        step.previous_draft,
        entropy_bound,
        pinned=step.pinned,
    )


def make_sampler(settings: DecodingSettings) -> Sampler:
    """The sampler of that name, ready for one block."""
    if settings.sampler == "confidence-threshold":
        return ConfidenceThresholdSampler(settings)
    return EntropyBoundSampler(settings)
