"""POST /v1/completions: raw text or ids, continued without a chat template."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from mlx_dgemma.api import encode_prompt
from mlx_dgemma.decoding.events import Draft
from mlx_dgemma.filling.infill import DEFAULT_PROMPT
from mlx_dgemma.prompt.tokenizer import Tokenizer
from mlx_dgemma.server.chat import all_warnings, usage
from mlx_dgemma.server.drafts import DraftWriter
from mlx_dgemma.server.engine import Call, Ended, Engine
from mlx_dgemma.server.errors import as_api_error
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.replies import Reply, collect, interleave, new_id
from mlx_dgemma.server.sampling import (
    MAX_STOP_STRINGS,
    check_model,
    check_room,
    decoding_options,
    read_seed,
    read_warnings,
)
from mlx_dgemma.server.streams import EventStream, data, unless_gone
from mlx_dgemma.server.structured import between

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class CompletionRequest:
    model: str
    calls: list[Call]
    stream: bool
    include_usage: bool
    logprobs: bool
    echo: str


def read_completion(engine: Engine, fields: Fields) -> CompletionRequest:
    model = check_model(engine, fields)
    text, ids = _prompt(engine.tokenizer, fields)
    check_room(engine, ids, "prompt")
    suffix = fields.text("suffix")
    choices = fields.integer("n", 1, engine.settings.max_choices) or 1
    asked = fields.integer("max_tokens", 1)
    max_tokens = asked or DEFAULT_MAX_TOKENS
    # OpenAI's number is how many alternatives to list; there are none here beside the chosen.
    logprobs = fields.integer("logprobs", 0, 5) is not None
    options = {
        **decoding_options(engine, fields, max_tokens),
        "stop": fields.strings("stop", MAX_STOP_STRINGS),
        "logprobs": logprobs,
    }
    stream = fields.flag("stream") or False
    streaming = fields.object("stream_options") or Fields({})
    seed = read_seed(fields, choices)
    echo = text if fields.flag("echo") else ""
    warnings = read_warnings(engine, fields, asked)
    drafts = stream and bool(streaming.flag("include_drafts"))
    call = Call(ids, ids, options, drafts, warnings)
    if suffix:
        # Both sides stand in the reply; the question is the one the model knows for it.
        if fields.strings("stop", MAX_STOP_STRINGS) or logprobs:
            raise fields.fail("suffix", "given without stop and logprobs")
        ids = encode_prompt(engine.tokenizer, DEFAULT_PROMPT)
        call = Call(ids, ids, options, False, warnings, between(text, suffix))
    return CompletionRequest(
        model=model,
        calls=[call.with_seed(seed + i) for i in range(choices)],
        stream=stream,
        include_usage=bool(streaming.flag("include_usage")),
        logprobs=logprobs,
        echo=echo,
    )


async def completions(engine: Engine, fields: Fields, request: Request) -> Any:
    asked = read_completion(engine, fields)
    if asked.stream:
        release = engine.admit(len(asked.calls))
        return EventStream(_chunks(engine, asked), release)
    replies = await unless_gone(request, collect(engine, asked.calls))
    choices = [
        {
            "index": index,
            "text": asked.echo + reply.text,
            "finish_reason": _reason(reply),
            "logprobs": _logprobs(engine.tokenizer, reply.logprobs) if asked.logprobs else None,
            "x_diffusion": reply.facts(),
        }
        for index, reply in enumerate(replies)
    ]
    body = {**_head(asked), "choices": choices, "usage": usage(replies)}
    return JSONResponse({**body, "x_warnings": all_warnings(asked.calls[0], replies)})


async def _chunks(engine: Engine, asked: CompletionRequest) -> AsyncGenerator[bytes, None]:
    replies = [Reply() for _ in asked.calls]
    drafts = [DraftWriter(engine.tokenizer) for _ in asked.calls]
    head = _head(asked)

    def chunk(index: int, text: str, **more: Any) -> bytes:
        choice = {"index": index, "text": text, "finish_reason": None, "logprobs": None, **more}
        return data({**head, "choices": [choice]})

    try:
        for index in range(len(replies) if asked.echo else 0):
            yield chunk(index, asked.echo)
        async with contextlib.aclosing(interleave(engine, asked.calls)) as events:
            async for index, event in events:
                replies[index].add(event)
                if isinstance(event, Draft):
                    draft = {"index": index, **drafts[index].write(event)}
                    yield data({**head, "choices": [], "x_draft": draft})
                elif isinstance(event, Ended):
                    reply = replies[index]
                    yield chunk(index, "", finish_reason=_reason(reply), x_diffusion=reply.facts())
                elif event.text or event.logprobs:
                    scored = list(zip(event.ids, event.logprobs, strict=False))
                    scores = _logprobs(engine.tokenizer, scored) if asked.logprobs else None
                    yield chunk(index, event.text, logprobs=scores)
    except Exception as error:
        engine.report(error)
        yield data(as_api_error(error).openai())
        return
    tail = {"x_warnings": all_warnings(asked.calls[0], replies)}
    if asked.include_usage:
        yield data({**head, "choices": [], "usage": usage(replies), **tail})
    elif tail["x_warnings"]:
        yield data({**head, "choices": [], **tail})
    yield b"data: [DONE]\n\n"


def _prompt(tokenizer: Tokenizer, fields: Fields) -> tuple[str, list[int]]:
    """(text, ids) of `prompt`: a string, token ids, or a list with one of either."""
    prompt = fields.raw("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt, [tokenizer.ids["bos"], *tokenizer.encode(prompt)]
    whole = isinstance(prompt, list) and all(type(id_) is int for id_ in prompt)
    if not whole or not prompt:
        raise fields.fail("prompt", "one string or one non-empty list of token ids")
    ids = encode_prompt(tokenizer, prompt)
    return tokenizer.decode(ids, skip_special=True), ids


def _head(asked: CompletionRequest) -> dict[str, Any]:
    return {
        "id": new_id("cmpl", "-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
    }


def _reason(reply: Reply) -> str:
    return "stop" if reply.end.finish.reason == "stop" else "length"


def _logprobs(tokenizer: Tokenizer, scored: list[tuple[int, float]]) -> dict[str, Any]:
    tokens = [tokenizer.decode([id_]) for id_, _ in scored]
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [value for _, value in scored],
        "top_logprobs": None,
        "text_offset": offsets,
    }
