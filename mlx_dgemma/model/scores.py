"""Log-probabilities of given tokens under the head, and the likeliest tokens beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.errors import InputError

if TYPE_CHECKING:
    from mlx_dgemma.model.network import Model

ROWS = 64  # whose logits are held at once: 67 MB in float32 of the published vocabulary
MOST_ALTERNATIVES = 20
_OUT_OF_REACH = -1e4  # a banned id's logit, before the softcap


def check_alternatives(top: object) -> None:
    """Refuses a number of alternatives that cannot be listed."""
    if top is not None and (type(top) is not int or not 0 <= top <= MOST_ALTERNATIVES):
        raise InputError(
            f"top_logprobs={top!r} is not possible: use a whole number from 0 to "
            f"{MOST_ALTERNATIVES}."
        )


class Scores(NamedTuple):
    """What R positions say, in nats, of the untempered and softcapped logits.

    logprobs: float32 [R], of the given ids. top_ids: int32 [R, k], the likeliest ids, the
    likeliest first; top_logprobs: float32 [R, k], theirs.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        return cls(*(np.concatenate(list(field)) for field in zip(*parts, strict=True)))


def scores(
    model: Model,
    hidden: mx.array,
    ids: np.ndarray | mx.array,
    top: int = 0,
    banned: Sequence[int] | np.ndarray = (),
) -> Scores:
    """Scores of hidden states [R, H] after the final norm, for one id int [R] each.

    top: how many alternatives to list. banned: ids that no position can take.
    """
    wanted = mx.array(ids).astype(mx.int32)
    forbidden = np.array(banned, dtype=np.int32)
    parts = []
    for start in range(0, max(hidden.shape[0], 1), ROWS):
        some = slice(start, start + ROWS)
        raw = model.raw_logits(hidden[some])
        if forbidden.size:
            raw[..., mx.array(forbidden)] = _OUT_OF_REACH
        logits = model.softcap(raw)
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        own = mx.take_along_axis(logs, wanted[some, None], axis=-1)[:, 0]
        best, found = _best(logs, top)
        mx.eval(own, best, found)
        parts.append(Scores(np.array(own), np.array(best), np.array(found)))
    return Scores.joined(parts)


def _best(logs: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """The `top` largest of each row of [R, V]: their places int32 [R, k] and values, falling."""
    if top == 0:
        nothing = mx.zeros((logs.shape[0], 0))
        return nothing.astype(mx.int32), nothing
    top = min(top, logs.shape[-1])
    if top == 1:
        best = mx.argmax(logs, axis=-1, keepdims=True)
    else:
        best = mx.argpartition(-logs, top - 1, axis=-1)[:, :top]
        order = mx.argsort(-mx.take_along_axis(logs, best, axis=-1), axis=-1)
        best = mx.take_along_axis(best, order, axis=-1)
    return best.astype(mx.int32), mx.take_along_axis(logs, best, axis=-1)
