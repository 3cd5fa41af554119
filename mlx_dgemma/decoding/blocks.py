"""The outer loop: one canvas after another, each committed to the context.

    prefill the prompt -> [ denoise a canvas -> commit its draft -> prefill the commit ] ...

Speaks token ids alone; `api` turns them into text.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.constraints.constraint import Language
from mlx_dgemma.constraints.transitions import END
from mlx_dgemma.decoding.block_result import BlockResult
from mlx_dgemma.decoding.canvas import CanvasRequest, Opening
from mlx_dgemma.decoding.canvas_constraint import CanvasConstraint
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import Draws
from mlx_dgemma.decoding.events import Commit, Draft, Event, Finish, FinishReason, listed
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.decoding.step import Step
from mlx_dgemma.decoding.stopping import cut_at_stop
from mlx_dgemma.errors import InputError, UnconvergedWarning
from mlx_dgemma.model.scores import check_alternatives

if TYPE_CHECKING:
    from mlx_dgemma.model import ContextCache, Model
    from mlx_dgemma.model.config import ModelConfig

# A first block that begins with a stop id is denoised again on canvases of these fractions of its
# length; the last attempt is taken whatever it says.
REROLL_DIVISORS = (1, 2, 4)


@dataclass(frozen=True)
class Request:
    """One generation on ids.

    prompt: ids that continue what the cache holds; may be empty then. images: ImagePatches, one
        per run of image placeholders in them.
    seed: reported in Finish; `draws`, made from it, give every random number.
    stop_ids: end the reply, anywhere on a canvas. opening: how the reply must begin.
    language: what a reply that ends by itself belongs to.
    drafts: yield a Draft per denoising step. alternatives: score committed ids, and list so many
        likely ids beside each; None scores none.
    cancel: checked between steps. prefilled: called once the prompt is in the cache. stops:
        offsets of the cache at which an encoder pass must end; `reached` is called there.
    observe: called with every step while it is on the device.
    first: the first canvas, already denoised with these draws, as a row of a batch.
    """

    prompt: Sequence[int]
    settings: DecodingSettings
    draws: Draws
    seed: int
    stop_ids: frozenset[int]
    images: Sequence[Any] = ()
    opening: Opening | None = None
    language: Language | None = None
    drafts: bool = False
    alternatives: int | None = None
    cancel: threading.Event | None = None
    prefilled: Callable[[], None] | None = None
    stops: Sequence[int] = ()
    reached: Callable[[int], None] | None = None
    observe: Callable[[Step], None] | None = None
    first: BlockResult | None = None

    def __post_init__(self) -> None:
        check_cancel(self.cancel)
        check_alternatives(self.alternatives)

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()


def check_cancel(cancel: object) -> None:
    """Refuses what cannot be asked whether it is set."""
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise InputError(f"cancel is a threading.Event or None, not a {type(cancel).__name__}.")


@dataclass
class _Tally:
    """What a request has cost so far; becomes its Finish."""

    prompt_tokens: int
    generated: int = 0
    state: int = 0  # of the language, after what was committed
    forwards: int = 0
    computed: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    converged: list[bool] = field(default_factory=list)
    fell_back: list[bool] = field(default_factory=list)
    prefill_seconds: float = 0.0
    denoise_seconds: float = 0.0

    def finish(self, reason: FinishReason, seed: int) -> Finish:
        return Finish(
            reason=reason,
            seed=seed,
            blocks=len(self.steps),
            steps_per_block=tuple(self.steps),
            converged=tuple(self.converged),
            fell_back=tuple(self.fell_back),
            computed=tuple(self.computed),
            tokens_per_forward=self.generated / self.forwards if self.forwards else 0.0,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated,
            prefill_seconds=self.prefill_seconds,
            denoise_seconds=self.denoise_seconds,
            peak_memory_bytes=mx.get_peak_memory(),
        )


def generate_blocks(
    model: Model, cache: ContextCache, request: Request
) -> Generator[Event, bool | None, None]:
    """Yields a Commit per block, then a Finish; with `request.drafts` a Draft per step as well.

    Texts in the events are empty. The caller may send(True) in answer to a Commit: the
    request then ends with reason "stop". On return the cache holds what it held before, the
    prompt and every committed block but the last, which no later block needs.

    Raises InputError when the prompt is empty or leaves no room for a canvas, NumericsError
    when the network produces NaN or Inf.
    """
    settings = request.settings
    length = settings.canvas_length or model.config.canvas_length
    limit = model.config.text.max_position_embeddings
    _check_room(model.config, len(request.prompt), length, cache.offset)
    mx.reset_peak_memory()
    tally = _Tally(prompt_tokens=len(request.prompt))
    if request.language is not None:
        tally.state = request.language.automaton.start

    started = time.perf_counter()
    _read_prompt(model, cache, request, length)
    if request.prefilled is not None and not request.cancelled:
        request.prefilled()
    tally.prefill_seconds = time.perf_counter() - started

    reason: FinishReason | None = "cancelled" if request.cancelled else None
    block = 0
    while reason is None:
        if cache.offset + length > limit:
            reason = "length"
            break
        started = time.perf_counter()
        result = yield from _reply_block(model, cache, request, length, block, tally)
        tally.denoise_seconds += time.perf_counter() - started
        if result is None:
            reason = "cancelled"
            break
        tally.steps.append(result.steps)
        tally.converged.append(result.converged)
        tally.fell_back.append(result.fell_back)
        if not result.converged and settings.on_unconverged == "refuse":
            reason = "unconverged"
            break
        if not result.converged and settings.on_unconverged == "warn":
            warnings.warn(
                f"Block {block} used all its {result.steps} denoising steps without converging; "
                "its text may be wrong and mislead the blocks after it.",
                UnconvergedWarning,
                stacklevel=2,
            )

        ids, stop_id = cut_at_stop(result.ids, request.stop_ids)
        kept = ids[: settings.max_tokens - tally.generated]
        tally.generated += len(kept)
        if request.language is not None:
            tally.state = request.language.automaton.after(tally.state, kept)
        asked_to_stop = yield _commit(result, kept, block)
        if asked_to_stop or (stop_id is not None and len(kept) == len(ids)):
            reason = "stop"
        elif tally.generated >= settings.max_tokens:
            reason = "length"
        else:
            started = time.perf_counter()
            model.prefill(result.ids[None], cache)
            tally.denoise_seconds += time.perf_counter() - started
            block += 1
    yield tally.finish(reason, request.seed)


def _read_prompt(model: Model, cache: ContextCache, request: Request, length: int) -> None:
    """Prefills the prompt with pauses at `request.stops`; ends early when it is cancelled."""
    prompt = np.array(list(request.prompt), dtype=np.int32)
    images = list(request.images)
    first = cache.offset
    end = first + prompt.size
    cache.expect(prompt.size)
    for stop in [*sorted(at for at in request.stops if first < at < end), end]:
        part = prompt[cache.offset - first : stop - first]
        count = _image_runs(part, model) if images else 0
        some, images = images[:count], images[count:]
        model.prefill(part[None], cache, images=some, cancelled=lambda: request.cancelled)
        if request.cancelled:
            break
        if request.reached is not None and stop in request.stops:
            request.reached(stop)
    model.await_context(cache, length)  # so that its time is not counted as denoising


def _image_runs(ids: np.ndarray, model: Model) -> int:
    """How many images stand in the ids."""
    here = ids == model.config.image_token_id
    return int(np.count_nonzero(here & ~np.concatenate([[False], here[:-1]])))


def _check_room(config: ModelConfig, prompt: int, length: int, offset: int) -> None:
    if prompt + offset == 0:
        raise InputError("The prompt is empty: write something to answer.")
    limit = config.text.max_position_embeddings
    longest = limit - offset - prompt
    if length > longest >= config.canvas_length:
        raise InputError(
            f"canvas_length={length} is not possible: beside this prompt the context has room for "
            f"{longest}; use at most that, or leave it out for {config.canvas_length}."
        )
    room = limit - offset - length
    if prompt > room:
        restart = ", or begin a new conversation (/reset in the chat)" if offset else ""
        raise InputError(
            f"The prompt has {prompt} tokens, but only {max(room, 0)} fit into the context "
            f"beside a canvas of {length}: shorten it{restart}."
        )


def _commit(result: BlockResult, ids: list[int], block: int) -> Commit:
    count, scored = len(ids), result.scores
    return Commit(
        ids=tuple(ids),
        text="",
        block=block,
        logprobs=() if scored is None else tuple(scored.logprobs[:count].tolist()),
        alternatives=() if scored is None else listed(scored, count),
        entropies=tuple(result.entropy[:count].tolist()),
        settled=tuple(result.settled[:count].tolist()),
    )


def _reply_block(
    model: Model, cache: ContextCache, request: Request, length: int, block: int, tally: _Tally
) -> Generator[Event, None, BlockResult | None]:
    """One block; guards the first against an empty reply. None when cancelled.

    Terse prompts can make the whole first draft stop ids. "reroll" denoises it again with
    other draws on shorter canvases; "suppress" keeps stop ids out of the first position, in
    draft and sample but not in the self-conditioning signal. With a constraint, that says whether
    a reply may be empty.
    """
    guard = request.settings.empty_reply
    first = block == 0
    canvas = CanvasRequest(request.draws)
    if request.language is not None:
        more = cache.offset + 2 * length <= model.config.text.max_position_embeddings
        left = request.settings.max_tokens - tally.generated
        canvas = replace(
            canvas, constraint=CanvasConstraint(request.language, tally.state, left, more)
        )
        guard = guard if request.language.automaton.start == END else "allow"
    if first and guard == "suppress":
        canvas = never_empty(model.config, canvas, request.stop_ids)
    divisors = REROLL_DIVISORS if first and guard == "reroll" else (1,)
    result = None
    for attempt, divisor in enumerate(divisors):
        part = max(length // divisor, 1)
        begun = canvas
        if request.opening is not None:
            begun = request.opening.on(canvas, tally.generated, part)
        if first and attempt == 0 and request.first is not None:
            result = request.first
            tally.forwards += result.steps
            tally.computed += result.computed
        else:
            result = yield from _denoise(model, cache, request, begun, part, block, attempt, tally)
        if result is None or int(result.ids[0]) not in request.stop_ids:
            break
    return result


def never_empty(
    config: ModelConfig, canvas: CanvasRequest, stop_ids: frozenset[int]
) -> CanvasRequest:
    """The canvas of a reply that cannot begin with its end."""
    vocabulary = np.arange(config.text.vocab_size, dtype=np.int32)
    return replace(canvas, allowed={0: np.setdiff1d(vocabulary, list(stop_ids))})


def _denoise(
    model: Model,
    cache: ContextCache,
    request: Request,
    canvas: CanvasRequest,
    length: int,
    block: int,
    attempt: int,
    tally: _Tally,
) -> Generator[Event, None, BlockResult | None]:
    steps = denoise_block(
        model,
        cache,
        request.settings,
        [canvas],
        block=block,
        attempt=attempt,
        length=length,
        alternatives=request.alternatives,
        stop_ids=request.stop_ids,
    )
    while True:
        if request.cancelled:
            steps.close()
            return None
        try:
            step = next(steps)
        except StopIteration as finished:
            results: list[BlockResult] = finished.value
            return results[0]
        tally.forwards += 1
        tally.computed.append(int(step.computed.sum()))
        if request.observe is not None:
            request.observe(step)
        if request.drafts:
            yield draft_event(step)


def draft_event(step: Step, row: int = 0) -> Draft:
    """The row's draft. Whole arrays are read: they are computed, while a row of one would need
    work of its own on the device."""
    line = step.rows.index(row)
    return Draft(
        ids=np.array(step.draft)[line],
        draft_text="",
        accepted=np.array(step.accepted)[line],
        entropy=np.array(step.entropy)[line],
        step=step.places[line].step,
        block=step.places[line].block,
    )
