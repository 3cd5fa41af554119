"""A draft for a client that watches the canvas: what changed, what has settled, how sure it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_dgemma.decoding.events import Draft
from mlx_dgemma.prompt.tokenizer import Tokenizer


class DraftWriter:
    """Turns the drafts of one reply into JSON, each compared with the one before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._last: Draft | None = None

    def write(self, draft: Draft) -> dict[str, Any]:
        """The `x_draft` object.

        text: the canvas as it would read if it were committed now. stable_prefix: characters
        at its start that the step left alone. changed: [start, end) spans of canvas positions.
        tokens, entropy (nats), accepted: one entry per position. mean_entropy: over all.
        """
        last, self._last = self._last, draft
        if last is not None and (last.block != draft.block or len(last.ids) != len(draft.ids)):
            last = None
        changed = np.ones(len(draft.ids), bool) if last is None else draft.ids != last.ids
        return {
            "block": draft.block,
            "step": draft.step,
            "text": draft.draft_text,
            "stable_prefix": 0 if last is None else _common(last.draft_text, draft.draft_text),
            "changed": _spans(changed),
            "mean_entropy": round(float(draft.entropy.mean()), 6),
            "tokens": [self._tokenizer.decode([id_]) for id_ in draft.ids.tolist()],
            "entropy": [round(value, 4) for value in draft.entropy.tolist()],
            "accepted": draft.accepted.astype(int).tolist(),
        }


def _common(old: str, new: str) -> int:
    length = min(len(old), len(new))
    return next((i for i in range(length) if old[i] != new[i]), length)


def _spans(mask: np.ndarray) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return edges.reshape(-1, 2).tolist()
