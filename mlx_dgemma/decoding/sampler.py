"""Which positions of a denoised canvas stay, and what the next canvas holds.

A sampler gets one step's statistics and answers with the next canvas; it remembers nothing between
steps, and the host reads nothing but `status` and `complete`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels.accept import Accepted, accept_renoise


class StepInput(NamedTuple):
    """One denoised canvas, all [b, C].

    canvas, draft, sample, fresh, previous_draft: int32 ids; previous_draft is None, or -1, on a
    row's first step. entropy float32, nats. sample_probability float32. outside bool, or None:
    positions that keep their id and count for nothing: the pinned ones, and what follows the text.
    revealed bool: positions that a previous step revealed, and the pinned ones.
    """

    canvas: mx.array
    entropy: mx.array
    draft: mx.array
    sample: mx.array
    sample_probability: mx.array
    fresh: mx.array
    previous_draft: mx.array | None
    outside: mx.array | None
    revealed: mx.array


class Decision(NamedTuple):
    """The sampler's answer.

    canvas int32 [b, C]: what the next step denoises. accepted bool [b, C].
    status float32 [b, 3]: draft repeated (0 or 1), mean entropy (nats), all finite (0 or 1).
    revealed: bool [b, C], the positions that stay as they are from now on.
    complete: bool [b], whether every position that counts stays; None where nothing asks.
    """

    canvas: mx.array
    accepted: mx.array
    status: mx.array
    revealed: mx.array
    complete: mx.array | None = None


class Sampler(Protocol):
    """Accepts and renoises."""

    def decide(self, step: StepInput, *, last: np.ndarray) -> Decision:
        """`last` bool [b] is True for rows on the schedule's final step."""


class EntropyBoundSampler:
    """The reference: keep the surest positions while their joint entropy stays within a bound.

    Decided at every step again; nothing freezes. Source: arXiv 2505.24857.
    """

    def __init__(self, settings: DecodingSettings) -> None:
        self.entropy_bound = settings.entropy_bound
        self.asked = settings.commit == "accepted"

    def decide(self, step: StepInput, *, last: np.ndarray) -> Decision:
        chosen = _accept(step, self.entropy_bound)
        complete = None
        if self.asked:
            complete = _or(chosen.accepted, step.outside).all(axis=1)
        return Decision(chosen.canvas, chosen.accepted, chosen.status, step.revealed, complete)


class ConfidenceThresholdSampler:
    """mlx-vlm's default: a position whose token is probable enough is revealed and stays.

    At least the surest hidden position is revealed per step, and all of them at the last. A
    row is complete when all its positions are revealed and none of them only because the steps
    ran out.
    """

    def __init__(self, settings: DecodingSettings) -> None:
        self.threshold = settings.reveal_threshold

    def decide(self, step: StepInput, *, last: np.ndarray) -> Decision:
        shown = _or(step.revealed, step.outside)
        hidden = mx.logical_not(shown)
        sure = self._surest(step.sample_probability, hidden)
        complete = mx.logical_or(shown, sure).all(axis=1)
        reveal = mx.where(mx.array(last)[:, None], hidden, sure) if last.any() else sure
        tokens = mx.where(reveal, step.sample, step.canvas)
        revealed = mx.logical_or(step.revealed, reveal)
        canvas = mx.where(mx.logical_or(shown, reveal), tokens, step.fresh)
        return Decision(canvas, reveal, _accept(step, 0.0).status, revealed, complete)

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
        pinned=step.outside,
    )


def _or(some: mx.array, others: mx.array | None) -> mx.array:
    return some if others is None else mx.logical_or(some, others)


def make_sampler(settings: DecodingSettings) -> Sampler:
    """The sampler that the settings name."""
    if settings.sampler == "confidence-threshold":
        return ConfidenceThresholdSampler(settings)
    return EntropyBoundSampler(settings)
