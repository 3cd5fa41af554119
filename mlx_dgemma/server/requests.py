"""From a request's fields to the replies it asks for, and back to an HTTP answer.

An endpoint reads what only its dialect has; the rest is read, refused and answered here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request

from mlx_dgemma.server.engine import Call, Engine
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.history import repair
from mlx_dgemma.server.sampling import (
    check_length,
    check_model,
    decoding_options,
    make_call,
    read_seed,
    read_warnings,
)
from mlx_dgemma.server.sse import EventStream, unless_gone
from mlx_dgemma.server.structured import Form, held, read_outputs, settled
from mlx_dgemma.server.tool_choice import ToolUse
from mlx_dgemma.server.tool_kinds import Origin
from mlx_dgemma.server.wire import JsonResponse


@dataclass(frozen=True)
class ParsedRequest:
    """A request, read. calls: one per choice, `choices` of each prompt. one_call: replies keep
    their first tool call. origins: see `ToolUse`."""

    model: str
    calls: list[Call]
    stream: bool
    include_usage: bool = False
    logprobs: bool = False
    one_call: bool = False
    choices: int = 1
    origins: Mapping[str, Origin] = field(default_factory=dict)

    @property
    def call(self) -> Call:
        """The first choice; the only one in dialects without choices."""
        return self.calls[0]


@dataclass(frozen=True)
class Streaming:
    """Whether and how a reply is streamed."""

    stream: bool
    drafts: bool
    include_usage: bool


def read_streaming(fields: Fields) -> Streaming:
    stream = fields.flag("stream") or False
    options = fields.object("stream_options") or Fields({})
    drafts = bool(options.flag("include_drafts"))
    return Streaming(stream, stream and drafts, bool(options.flag("include_usage")))


@dataclass(frozen=True)
class Chat:
    """What an endpoint has read of a chat in its dialect.

    stop: the name of the field with stop strings. logprobs: score the reply's tokens, and list so
    many likely ones beside each; None scores none. notes: warnings so far.
    """

    messages: list[Any]
    tools: ToolUse
    max_tokens: int | None
    stop: str | None
    thinking: bool
    wanted: Form | None = None
    choices: int = 1
    logprobs: int | None = None
    notes: Sequence[str] = ()


async def read_request(engine: Engine, fields: Fields, read: Callable[[], Chat]) -> ParsedRequest:
    """Checks and encodes a chat; raises ApiError or InputError for what cannot be served.

    read: reads what only the dialect has; a long conversation takes its time, so it is called off
    the event loop.
    """
    started = await asyncio.to_thread(_read_fields, engine, fields, read)
    return await _encode(engine, fields, *started)


@dataclass(frozen=True)
class _Options:
    """What every dialect asks in the same words."""

    model: str
    decoding: dict[str, Any]
    streaming: Streaming
    seed: int
    image_tokens: int | None
    warnings: tuple[str, ...]


def _read_fields(engine: Engine, fields: Fields, read: Callable[[], Chat]) -> tuple[Chat, _Options]:
    """The chat repaired, and its options; at the end it warns of every field that was not read."""
    chat = read()
    model = check_model(engine, fields)
    decoding = decoding_options(engine, fields, chat.max_tokens)
    if chat.stop is not None:
        decoding["stop"] = fields.strings(chat.stop)
    if chat.logprobs is not None:
        decoding |= {"logprobs": True, "top_logprobs": chat.logprobs}
    streaming = read_streaming(fields)
    seed = read_seed(fields)
    image_tokens = fields.integer("image_tokens")
    messages, repaired = repair(chat.messages)
    outputs = read_outputs(fields)
    if outputs is not None and (chat.wanted is not None or chat.tools.forced):
        raise fields.fail("structured_outputs", "given without another format and forced tools")
    chat = replace(chat, messages=messages, wanted=chat.wanted or outputs)
    check_length(engine, [messages, chat.tools.declared], "messages")
    unknown = read_warnings(engine, fields, chat.max_tokens)
    warnings = (*chat.notes, *chat.tools.warnings, *repaired, *unknown)
    return chat, _Options(model, decoding, streaming, seed, image_tokens, warnings)


async def _encode(engine: Engine, fields: Fields, chat: Chat, options: _Options) -> ParsedRequest:
    tools, thinking, warnings = chat.tools, chat.thinking, options.warnings
    if thinking and (tools.forced or chat.wanted is not None):
        what = "a forced tool_choice" if tools.forced else "response_format"
        thinking, warnings = False, (*warnings, f"thinking was left out for {what}")
    call = await make_call(
        engine,
        chat.messages,
        tools.declared,
        options.decoding,
        thinking=thinking,
        drafts=options.streaming.drafts,
        seed=options.seed,
        warnings=warnings,
        image_tokens=options.image_tokens,
        hold=fields.hold,
    )
    # A prompt that is too long costs no language.
    language, source, unchecked = await held(engine, await settled(chat.wanted), tools)
    decoding = call.options if language is None else {**call.options, "constraint": language}
    call = replace(call, options=decoding, source=source, warnings=(*call.warnings, *unchecked))
    return ParsedRequest(
        model=options.model,
        calls=[call.with_seed(options.seed + i) for i in range(chat.choices)],
        stream=options.streaming.stream,
        include_usage=options.streaming.include_usage,
        logprobs=chat.logprobs is not None,
        choices=chat.choices,
        one_call=tools.one_call,
        origins=tools.origins,
    )


async def respond(
    request: Request,
    asked: ParsedRequest,
    *,
    whole: Callable[[], Coroutine[Any, Any, dict[str, Any]]],
    events: Callable[[], AsyncGenerator[bytes, None]],
) -> Any:
    """The answer in one piece or as a stream; 429 when there is no room for it."""
    request.state.place.widen(len(asked.calls))
    if asked.stream:
        return EventStream(events())
    # A request's own words may come back, and writing megabytes of them takes its time.
    return await asyncio.to_thread(JsonResponse, await unless_gone(request, whole()))
