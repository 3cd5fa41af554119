"""From a request's fields to the replies it asks for, and back to an HTTP answer.

An endpoint reads what only its dialect has; the rest is read, refused and answered here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from mlx_dgemma.server.engine import Call, Engine
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.history import mend
from mlx_dgemma.server.sampling import (
    check_model,
    decoding_options,
    make_call,
    read_seed,
    read_warnings,
)
from mlx_dgemma.server.sse import EventStream, unless_gone
from mlx_dgemma.server.structured import Wanted, held, read_outputs
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


async def read_request(
    engine: Engine,
    fields: Fields,
    messages: list[Any],
    tools: ToolUse,
    *,
    max_tokens: int | None,
    stop: str | None,
    thinking: bool,
    wanted: Wanted | None = None,
    choices: int = 1,
    logprobs: int | None = None,
    notes: Sequence[str] = (),
) -> ParsedRequest:
    """Checks and encodes a chat; raises ApiError or InputError for what cannot be served.

    stop: the name of the field with stop strings. logprobs: score the reply's tokens, and list so
    many likely ones beside each; None scores none. notes: warnings so far. Call it last: it warns
    of every field that was not read.
    """
    model = check_model(engine, fields)
    options = decoding_options(engine, fields, max_tokens)
    if stop is not None:
        options["stop"] = fields.strings(stop)
    if logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": logprobs}
    streaming = read_streaming(fields)
    seed = read_seed(fields)
    image_tokens = fields.integer("image_tokens")
    messages, mended = mend(messages)
    wanted = wanted or read_outputs(fields)
    warnings = (*notes, *tools.warnings, *mended, *read_warnings(engine, fields, max_tokens))
    language, source, unchecked = await held(engine, wanted, tools)
    warnings += unchecked
    if language is not None:
        options["constraint"] = language
    if thinking and (tools.forced or wanted is not None):
        what = "a forced tool_choice" if tools.forced else "response_format"
        thinking, warnings = False, (*warnings, f"thinking was left out for {what}")
    call = await make_call(
        engine,
        messages,
        tools.declared,
        options,
        thinking=thinking,
        drafts=streaming.drafts,
        seed=seed,
        warnings=warnings,
        source=source,
        image_tokens=image_tokens,
        hold=fields.hold,
    )
    return ParsedRequest(
        model=model,
        calls=[call.with_seed(seed + i) for i in range(choices)],
        stream=streaming.stream,
        include_usage=streaming.include_usage,
        logprobs=logprobs is not None,
        choices=choices,
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
    return JsonResponse(await unless_gone(request, whole()))
