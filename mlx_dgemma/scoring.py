"""How likely a given text is: log-probabilities of a prompt's tokens, each given those before it.

They come from the encoder pass, which reads a prompt causally and which Google's recipe trains with
a next-token loss beside the canvas' own (training/loss.py). It is not the pass that writes replies:
a canvas is denoised with both sides in view, and gives no probability of a whole text. So these
numbers rank texts, as multiple-choice tasks need; they are not the odds that a reply would be this.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_dgemma.errors import CancelledError, InputError
from mlx_dgemma.machine.gpu_failures import explained
from mlx_dgemma.model import ContextCache, Model
from mlx_dgemma.model.network import CHUNK
from mlx_dgemma.model.prompt_ids import token_ids
from mlx_dgemma.model.scores import Scores, check_alternatives, scores


def prompt_scores(model: Model, ids: Sequence[int], *, top_logprobs: int = 0) -> Scores:
    """Scores of `ids`, the first of which has nothing before it: NaN, with alternatives of NaN.

    top_logprobs: how many alternatives to list at each place, 20 at most. Raises InputError for
    no ids, and for more than the context holds.
    """
    for step in prompt_score_turns(model, ids, top_logprobs=top_logprobs):
        if isinstance(step, Scores):
            return step
    raise AssertionError("prompt_score_turns ends with Scores")


def prompt_score_turns(
    model: Model,
    ids: Sequence[int],
    *,
    top_logprobs: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generator[int | Scores, None, None]:
    """`prompt_scores` for a thread that others wait for: yields the tokens read so far after every
    pass, and the Scores last. CancelledError when `cancelled` says so between two passes."""
    check_scorable(model, ids, top_logprobs)
    tokens = token_ids(ids, model.config.text.vocab_size)
    parts = [_nothing_before(top_logprobs)]
    cache = model.make_cache()
    for start, hidden in _passes(model, tokens[:-1], cache):
        following = tokens[start + 1 : start + 1 + len(hidden)]
        with explained():
            parts.append(scores(model, hidden, following, top_logprobs))
        yield start + len(hidden)
        if cancelled():
            raise CancelledError("The prompt was not scored: the request was cancelled.")
    yield Scores.joined(parts)


def continuation_scores(
    model: Model,
    context: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    top_logprobs: int = 0,
) -> list[Scores]:
    """Scores of several texts, each as it would follow `context`, which is read once.

    Those of `prompt_scores(context + continuation)` from the continuation on, to rounding.
    """
    longest = max(map(len, continuations), default=0)
    check_scorable(model, [*context, *[0] * longest], top_logprobs)
    if not context:
        raise InputError("There is no context for these texts: begin it with the bos token.")
    cache = model.make_cache()
    last = mx.zeros((0, 0))
    size = model.config.text.vocab_size
    for _, hidden in _passes(model, token_ids(context, size), cache):
        last = hidden[-1:]
    mx.eval(last)
    before = cache.snapshot()
    found = []
    for continuation in continuations:
        cache.restore(before)
        tokens = token_ids(continuation, size)
        rows = [last, *(hidden for _, hidden in _passes(model, tokens[:-1], cache))]
        with explained():
            found.append(scores(model, mx.concatenate(rows)[: len(tokens)], tokens, top_logprobs))
    return found


def check_scorable(model: Model, ids: Sequence[int], top_logprobs: int) -> None:
    """Refuses what cannot be scored, before anything is computed."""
    room = model.config.text.max_position_embeddings
    if not ids:
        raise InputError("There is nothing to score: give at least one token.")
    if len(ids) > room:
        raise InputError(f"{len(ids)} tokens cannot be scored: the context holds {room}.")
    check_alternatives(top_logprobs)


def _passes(
    model: Model, tokens: np.ndarray, cache: ContextCache
) -> Iterator[tuple[int, mx.array]]:
    """(place of the first, hidden states [L, H]) of every encoder pass over the tokens."""
    cache.expect(tokens.size)
    for start in range(0, tokens.size, CHUNK):
        with explained():
            hidden = model.encode(tokens[start : start + CHUNK], cache)[0]
            mx.eval(hidden, cache.arrays)
        yield start, hidden


def _nothing_before(top: int) -> Scores:
    unknown = np.full((1, top), np.nan, dtype=np.float32)
    first = np.full(1, np.nan, dtype=np.float32)
    return Scores(first, np.zeros((1, top), dtype=np.int32), unknown)
