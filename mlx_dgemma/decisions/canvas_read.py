"""One decoder pass over a canvas that the caller wrote, and what it says at every position.

This is the read that decisions are made of, for callers who bring their own forms (vLLM's users).
Nothing is drawn: the same prompt and canvas give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dgemma.context.prompt_cache import PromptCache, exclusively
from mlx_dgemma.decoding.events import Alternatives
from mlx_dgemma.errors import CancelledError, InputError, NumericsError
from mlx_dgemma.machine.gpu_failures import explained
from mlx_dgemma.model import Model
from mlx_dgemma.model.scores import ROWS, check_alternatives, scores
from mlx_dgemma.prompt.media import PreparedPrompt

MOST_LISTED = 128  # ids whose log-probabilities can be asked for


@dataclass(frozen=True)
class CanvasForm:
    """A canvas to read, and what to say of it.

    ids: one for each position. rows: of so many positions, from the first. top: so many of the
    likeliest ids are listed at each; among: these are listed instead. only_among: nothing else can
    stand at a position, so that their probabilities add up to 1.

    Raises InputError for ids outside the vocabulary and for what cannot be listed.
    """

    ids: tuple[int, ...]
    vocabulary: int
    rows: int
    top: int = 0
    among: tuple[int, ...] = ()
    only_among: bool = False

    def __post_init__(self) -> None:
        check_alternatives(self.top)
        if not self.ids or self.rows < 1:
            raise InputError("A canvas to read has at least one position.")
        for id_ in (*self.ids, *self.among):
            if type(id_) is not int or not 0 <= id_ < self.vocabulary:
                raise InputError(f"{id_!r} is no token id: use 0 to {self.vocabulary - 1}.")
        if len(self.among) > MOST_LISTED or len(set(self.among)) < len(self.among):
            raise InputError(f"List at most {MOST_LISTED} token ids, each once.")
        if self.only_among and not self.among:
            raise InputError("Name the token ids that alone can stand at a position.")


@dataclass(frozen=True)
class CanvasRead:
    """ids: the likeliest of each position. logprobs: theirs (nats, untempered). alternatives:
    what the form lists, the likeliest first. cached_tokens: of the prompt, from a cache."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    alternatives: tuple[Alternatives, ...]
    cached_tokens: int


def read_canvas_turns(
    model: Model,
    prompt: PreparedPrompt,
    form: CanvasForm,
    cache: PromptCache | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Generator[CanvasRead, None, None]:
    """Reads the prompt and one pass over the canvas, as the one turn of a thread that others wait
    for. cache: keeps the prompt's context for the next canvas."""
    kept = PromptCache(model) if cache is None else cache

    def turn() -> Generator[CanvasRead, None, None]:
        with explained():
            cached = read_prompt(model, prompt, kept, cancelled)
            hidden = model.hidden(mx.array(form.ids)[None], kept.cache)[0, : form.rows]
            ids, logprobs, alternatives = _said(model, hidden, form)
        yield CanvasRead(ids, logprobs, alternatives, cached)

    return exclusively(kept, turn())


def read_prompt(
    model: Model,
    prompt: PreparedPrompt,
    cache: PromptCache,
    cancelled: Callable[[], bool] | None = None,
) -> int:
    """Fills the cache with the prompt's context; returns how many of its ids were there.

    cancelled: asked between two parts of a long prompt; CancelledError, and an empty cache, once it
    says so."""
    keys = prompt.keys
    cached = len(keys) - len(cache.align(keys))
    ids = prompt.network_ids(model.config.image_token_id)[cached:]
    if ids:
        images = [image.patches for image in prompt.images_after(cached)]
        model.prefill(np.array(ids)[None], cache.cache, images=images or None, cancelled=cancelled)
        if cancelled is not None and cancelled():
            cache.forget()
            raise CancelledError("The request was cancelled while its prompt was read.")
    cache.mark(keys)
    return cached


_Said = tuple[tuple[int, ...], tuple[float, ...], tuple[Alternatives, ...]]


def _said(model: Model, hidden: mx.array, form: CanvasForm) -> _Said:
    """The form's rows, from hidden states [R, H]."""
    if not form.among:
        found = scores(model, hidden, mx.zeros(hidden.shape[0]), max(form.top, 1))
        places, values = found.top_ids, found.top_logprobs
        best = places[:, 0], values[:, 0]
        places, values = places[:, : form.top], values[:, : form.top]
    else:
        best, places, values = _listed(model, hidden, form)
    if not np.isfinite(best[1]).all():
        raise NumericsError(
            "The network produced NaN or Inf; check the weights with `mlx_dgemma.convert verify`."
        )
    alternatives = tuple(
        tuple(zip(row.tolist(), logs.tolist(), strict=True))
        for row, logs in zip(places, values, strict=True)
    )
    return tuple(best[0].tolist()), tuple(best[1].tolist()), alternatives


def _listed(
    model: Model, hidden: mx.array, form: CanvasForm
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """((likeliest id, its logprob) of each row, the listed ids, their logprobs), sorted."""
    among, likeliest, chosen = np.array(form.among, dtype=np.int32), [], []
    for start in range(0, hidden.shape[0], ROWS):
        logits = model.softcap(model.raw_logits(hidden[start : start + ROWS]))
        of_all = mx.logsumexp(logits, axis=-1, keepdims=True)
        some = logits[:, mx.array(among)]
        logs = some - (mx.logsumexp(some, axis=-1, keepdims=True) if form.only_among else of_all)
        top = mx.argmax(logits, axis=-1)
        of_top = mx.take_along_axis(logits, top[:, None], axis=-1) - of_all
        chosen.append(np.array(logs))
        likeliest.append((np.array(top), np.array(of_top)[:, 0]))
    values = np.concatenate(chosen)
    order = np.argsort(-values, axis=-1, kind="stable")
    places, values = among[order], np.take_along_axis(values, order, axis=-1)
    if form.only_among:
        return (places[:, 0], values[:, 0]), places, values
    best, own = (np.concatenate(part) for part in zip(*likeliest, strict=True))
    return (best, own), places, values
