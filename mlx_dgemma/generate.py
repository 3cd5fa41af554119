"""Generate with a loaded model: the rooms joined.

model, tokenizer = load()                        # the bundled demo checkpoint
print(generate(model, tokenizer, "Count from 3 to 9."))
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from mlx_dgemma.checkpoint.plan import slices_head
from mlx_dgemma.checkpoint.sizes import working_bytes
from mlx_dgemma.constraints import Constraint, Language
from mlx_dgemma.context.prompt_cache import PromptCache, check_cache, exclusively
from mlx_dgemma.decoding.blocks import Request, generate_blocks
from mlx_dgemma.decoding.canvas import Opening
from mlx_dgemma.decoding.draws import Draws, SeededDraws, check_seed, fresh_seed
from mlx_dgemma.decoding.events import Commit, Draft, Event
from mlx_dgemma.decoding.settings import (
    CommitRule,
    Conditioning,
    DecodingOptions,
    DecodingSettings,
    EmptyReplyPolicy,
    PositionsRule,
    PresetName,
    SamplerName,
    UnconvergedPolicy,
    overrides,
)
from mlx_dgemma.decoding.stopping import cut_at_stop
from mlx_dgemma.decoding.trace import RecordingDraws, Trace, check_traceable, config_digest
from mlx_dgemma.errors import GpuError, GpuMemoryError, InputError
from mlx_dgemma.machine.gpu_failures import explained
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.machine.memory import is_short
from mlx_dgemma.machine.process import claim_process
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import ReplyReader, Tokenizer
from mlx_dgemma.prompt.encode import Prompt as Prompt
from mlx_dgemma.prompt.encode import encode_prompt as encode_prompt
from mlx_dgemma.prompt.encode import prepare_prompt
from mlx_dgemma.prompt.media import PreparedPrompt
from mlx_dgemma.prompt.reply import Increment


def stream_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    images: Sequence[Any] | None = None,
    image_tokens: int | None = None,
    drafts: bool = False,
    max_tokens: int = 256,
    seed: int | None = None,
    temp: float = 1.0,
    preset: PresetName = "reference",
    sampler: SamplerName = "entropy-bound",
    max_denoising_steps: int | None = None,
    entropy_bound: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    stability_threshold: int | None = None,
    confidence_threshold: float | None = None,
    commit: CommitRule | None = None,
    commit_entropy: float | None = None,
    positions: PositionsRule | None = None,
    check_share: float | None = None,
    reveal_threshold: float | None = None,
    canvas_length: int | None = None,
    stop: str | Sequence[str] = (),
    system_prompt: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
    cache: PromptCache | None = None,
    cancel: threading.Event | None = None,
    on_unconverged: UnconvergedPolicy = "commit",
    empty_reply: EmptyReplyPolicy = "reroll",
    conditioning: Conditioning = "auto",
    sliced_head: bool | None = None,
    kv_bits: int | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    opening: Opening | None = None,
    constraint: Constraint | Language | None = None,
    trace: str | Path | None = None,
) -> Generator[Event, None, None]:
    """Generates a reply; yields a Commit per block and a Finish, with `drafts` each Draft too.

    Text that a block held back, such as the start of a stop string, comes in a last Commit
    without ids.

    prompt: a str is one user message, messages go through the chat template, a list or array
        of ids is taken as it is. images: paths, URLs, bytes, PIL images or numpy arrays that
        come before a str prompt, or belong to the messages' image parts that name none.
        image_tokens: the most soft tokens an image may take.
    seed: drawn and reported in Finish when None; the same seed on the same build and device
        gives the same ids.
    temp: divides the logits for sampling only; 0.0 takes the argmax. mlx-lm's default is 0.0;
        this model's reference always samples, so ours is 1.0.
    preset: named settings; "balanced" and "turbo" compute less, and are not exact.
    sampler, max_denoising_steps, ..., canvas_length: see DecodingSettings; None takes the
        preset's, then the checkpoint's generation config.
    stop: strings that end the answer. tools: functions in OpenAI's form; calls arrive in
        Commit.tool_calls. cache: a PromptCache that keeps the context for the next turn.
    sliced_head: None holds the logits of a canvas whole, unless this machine's memory only
        suffices for slices of them.
    kv_bits: 8 keeps the context of full-attention layers in 8 bits, about half the memory of a
        long one and no longer exact. With a cache, as the cache was made.
    cancel: set it from any thread; the generation ends between two denoising steps.
    logprobs: score committed ids in Commit.logprobs; top_logprobs: and list so many likely ids
        in Commit.alternatives. opening: ids the reply must begin with.
    constraint: what a reply that ends by itself must be: Constraint.regex(...), .choice(...),
        .json_schema(...), .json_object(); one that max_tokens cuts is the beginning of such a text.
    trace: a file to record every draw in; not together with an opening.

    Closing the generator frees everything it holds. Raises InputError for a request that
    cannot be served, NumericsError when the network produces NaN or Inf,
    GpuError or GpuMemoryError when the GPU gave up: a cache is then empty, and the next request
    may succeed.
    """
    given = overrides(locals())
    claim_process()
    check_cache(cache)
    if cache is not None and kv_bits is None:
        kv_bits = cache.kv_bits
    given["kv_bits"] = kv_bits
    settings = DecodingSettings.from_defaults(model.config.generation, given)
    if cache is not None and kv_bits != cache.kv_bits:
        raise InputError(
            f"The cache keeps its context exactly: make it with PromptCache(model, {kv_bits=})."
        )
    seed = fresh_seed() if seed is None else check_seed(seed)
    prepared = prepare_prompt(
        model,
        tokenizer,
        prompt,
        images=images,
        image_tokens=image_tokens,
        system_prompt=system_prompt,
        tools=tools,
        enable_thinking=enable_thinking,
    )
    ids = prepared.network_ids(model.config.image_token_id)
    if sliced_head is None and slices_head(model.config, len(ids) + settings.max_tokens, kv_bits):
        settings = replace(settings, sliced_head=True)
    reader = ReplyReader(tokenizer, stop=stop, tools=_tool_names(tools))
    draws: Draws = SeededDraws(seed)
    language = language_of(model, tokenizer, constraint)
    record = None
    if trace is not None:
        check_traceable(trace, opening=opening is not None, images=bool(prepared.images))
        record = Trace(seed, ids, asdict(settings), config_digest(model.config))
        if language is not None and language.source is not None:
            record.constraint = asdict(language.source)
        draws = RecordingDraws(draws, record)
    request = Request(
        prompt=ids,
        settings=settings,
        draws=draws,
        seed=seed,
        stop_ids=tokenizer.stop_ids,
        opening=opening,
        language=language,
        drafts=drafts,
        alternatives=top_logprobs if logprobs or top_logprobs else None,
        cancel=cancel,
        observe=None if record is None else record.observe,
    )
    return exclusively(
        cache, stream_request(model, tokenizer, request, reader, prepared, cache, record, trace)
    )


def language_of(
    model: Model, tokenizer: Tokenizer, constraint: Constraint | Language | None
) -> Language | None:
    """What a reply belongs to; InputError for a constraint that is none."""
    if isinstance(constraint, Constraint):
        return constraint.language(tokenizer, model.config.text.vocab_size)
    if constraint is not None and not isinstance(constraint, Language):
        raise InputError(
            f"constraint={constraint!r:.60} is not possible: use Constraint.regex(...), "
            ".choice(...), .json_schema(...) or .json_object()."
        )
    return constraint


class Options(DecodingOptions, total=False):
    """The keywords of `stream_generate`, for functions that pass them on."""

    images: Sequence[Any] | None
    image_tokens: int | None
    seed: int | None
    stop: str | Sequence[str]
    system_prompt: str | None
    tools: Sequence[Mapping[str, Any]] | None
    enable_thinking: bool
    cache: PromptCache | None
    logprobs: bool
    top_logprobs: int
    opening: Opening | None
    constraint: Constraint | Language | None
    trace: str | Path | None


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    cancel: threading.Event | None = None,
    **options: Unpack[Options],
) -> str:
    """The answer as one string; thoughts and tool calls are only in `stream_generate`'s events."""
    stream = stream_generate(model, tokenizer, prompt, cancel=cancel, **options)
    return "".join(event.text for event in stream)


def stream_request(
    model: Model,
    tokenizer: Tokenizer,
    request: Request,
    reader: ReplyReader,
    prepared: PreparedPrompt,
    cache: PromptCache | None = None,
    record: Trace | None = None,
    trace: str | Path | None = None,
) -> Generator[Event, None, None]:
    """The events of a request on ids, with their texts; `prepared` is its prompt as it was encoded,
    `record` what is saved as `trace`."""
    prompt, read = request.prompt, 0
    if cache is None:
        context = model.make_cache(request.settings.kv_bits)
    else:
        keys = prepared.keys
        with explained():
            read = len(keys) - len(cache.align(keys))
        context = cache.cache
        request = replace(
            request,
            prompt=prompt[read:],
            prefilled=partial(cache.mark, keys),
            stops=cache.stops(keys),
            reached=cache.reached,
        )
    unread = [image.patches for image in prepared.images_after(read)]
    if unread:
        request = replace(
            request, images=unread, prefilled=_then_release(model, request.prefilled, len(prompt))
        )
    blocks = generate_blocks(model, context, request)
    answer: bool | None = None
    last_block = 0
    try:
        while True:
            try:
                with explained():
                    event = blocks.send(answer)
            except StopIteration:
                return
            except (GpuError, GpuMemoryError):
                if cache is not None:  # what it holds was perhaps never computed
                    cache.forget()
                raise
            answer = None
            if isinstance(event, Draft):
                yield replace(event, draft_text=draft_text(tokenizer, event.ids))
            elif isinstance(event, Commit):
                if record is not None:
                    record.committed.append(list(event.ids))
                increment = reader.feed(event.ids)
                answer, last_block = increment.stopped or None, event.block
                yield _commit(event, increment)
            else:
                held = reader.finish()
                if not held.empty:
                    yield _commit(Commit(ids=(), text="", block=last_block), held)
                if record is not None and trace is not None:
                    record.save(trace)
                yield replace(event, prompt_tokens=len(prompt), stop_string=reader.stop_string)
    finally:
        blocks.close()


def _then_release(
    model: Model, prefilled: Callable[[], None] | None, tokens: int
) -> Callable[[], None]:
    """After a prompt with images: releases the vision tower if denoising needs its memory."""

    def done() -> None:
        if prefilled is not None:
            prefilled()
        if is_short(machine(), working_bytes(model.config, tokens)):
            model.release_vision()

    return done


def draft_text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """A draft, int ids [C], as a reader would see it if it were committed now: markers and tail
    removed."""
    kept, _ = cut_at_stop(ids, tokenizer.stop_ids)
    reader = ReplyReader(tokenizer)
    parts = (reader.feed(kept), reader.finish())
    return "".join(part.thinking for part in parts) + "".join(part.text for part in parts)


def _commit(event: Commit, increment: Increment) -> Commit:
    return replace(
        event,
        text=increment.text,
        thinking=increment.thinking,
        tool_calls=increment.tool_calls,
        malformed_calls=increment.malformed_calls,
        cut_call=increment.cut_call,
    )


def _tool_names(tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    return [tool.get("function", tool).get("name", "") for tool in tools or ()]


if __name__ == "__main__":  # `python -m mlx_dgemma.generate`
    import sys

    from mlx_dgemma.__main__ import launch

    sys.exit(launch("generate"))
