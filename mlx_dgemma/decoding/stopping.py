"""When a block is done."""

from __future__ import annotations

import numpy as np

from mlx_dgemma.decoding.settings import DecodingSettings


class StableAndConfident:
    """The reference's rule: the draft has stopped moving and the network is sure of it.

    stability_threshold: k asks for k + 1 equal drafts in a row; 0 leaves confidence alone.
    confidence_threshold: nats; the mean entropy must be strictly below it.

    Source: StableAndConfidentStoppingCriteria in transformers' diffusion_gemma.
    """

    def __init__(self, stability_threshold: int, confidence_threshold: float) -> None:
        self.stability_threshold = stability_threshold
        self.confidence_threshold = _single(confidence_threshold)

    def count(self, repeats: np.ndarray, repeated: np.ndarray) -> np.ndarray:
        """int64 [b]: equal drafts in a row, given those so far and bool [b] of this step."""
        return np.where(repeated, repeats + 1, 0)

    def __call__(self, repeats: np.ndarray, mean_entropy: np.ndarray) -> np.ndarray:
        """bool [b]: which rows stop, given `count` and this step's mean entropy float32 [b]."""
        stable = repeats >= self.stability_threshold
        return stable & (mean_entropy < self.confidence_threshold)


class AllAccepted:
    """A step that accepts every position ends the block: no other confirms what it says.

    below: nats; the mean entropy must be strictly below it. None: a sampler that reveals positions
        ends a row by itself, whatever its entropy, and so it does in the reference.
    """

    def __init__(self, below: float | None) -> None:
        self.below = None if below is None else _single(below)

    def __call__(
        self, complete: np.ndarray, mean_entropy: np.ndarray, fallen: np.ndarray | None
    ) -> np.ndarray:
        """bool [b]: which rows stop, given which are `complete`, their mean entropy (nats), and
        which are left to the reference, if any."""
        if self.below is None:
            return complete
        early = complete & (mean_entropy < self.below)
        return early if fallen is None else early & ~fallen


def _single(nats: float) -> np.float32:
    """In the precision of the entropies; infinite where that cannot hold it."""
    with np.errstate(over="ignore"):
        return np.float32(nats)


def stop_rules(settings: DecodingSettings) -> tuple[StableAndConfident, AllAccepted]:
    """The rules of a block, of which either may end it."""
    reveals = settings.sampler == "confidence-threshold"
    return (
        StableAndConfident(settings.stability_threshold, settings.confidence_threshold),
        AllAccepted(None if reveals else settings.commit_below),
    )


def cut_at_stop(ids: np.ndarray, stop_ids: frozenset[int]) -> tuple[list[int], int | None]:
    """The ids before the first stop id on a canvas int32 [C], and that stop id (or None)."""
    for position, token in enumerate(ids.tolist()):
        if token in stop_ids:
            return ids[:position].tolist(), token
    return ids.tolist(), None
