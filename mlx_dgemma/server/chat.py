"""POST /v1/chat/completions."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from mlx_dgemma.decoding.events import Draft
from mlx_dgemma.prompt.tokenizer import Tokenizer
from mlx_dgemma.server.drafts import DraftWriter
from mlx_dgemma.server.engine import Call, Ended, Engine
from mlx_dgemma.server.errors import ApiError, as_api_error
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.replies import Reply, collect, interleave, new_id
from mlx_dgemma.server.sampling import (
    MAX_STOP_STRINGS,
    check_model,
    decoding_options,
    make_call,
    read_seed,
    read_thinking,
    read_tools,
    read_warnings,
)
from mlx_dgemma.server.streams import EventStream, data, unless_gone
from mlx_dgemma.server.structured import pinned, read_format, refuse_together


@dataclass(frozen=True)
class ChatRequest:
    """A request, read. calls: one per choice. one_call: parallel_tool_calls was false."""

    model: str
    calls: list[Call]
    stream: bool
    include_usage: bool
    logprobs: bool
    one_call: bool


async def read_chat(engine: Engine, fields: Fields) -> ChatRequest:
    """Checks and encodes; raises ApiError or InputError for what cannot be served."""
    model = check_model(engine, fields)
    messages = fields.items("messages")
    if messages is None:
        raise fields.fail("messages", "given as a list")
    for legacy in ("functions", "function_call"):
        if fields.raw(legacy) is not None:
            raise ApiError(400, f"{legacy} is not supported; use tools.", param=legacy)
    if (fields.items("modalities") or ["text"]) != ["text"]:
        raise fields.fail("modalities", "['text']")
    wanted = read_format(fields)
    tools, warnings = read_tools(fields)
    choices = fields.integer("n", 1, engine.settings.max_choices) or 1
    limit = fields.integer("max_completion_tokens", 1)
    older = fields.integer("max_tokens", 1)
    max_tokens = older if limit is None else limit
    logprobs = fields.flag("logprobs") or False
    options = {
        **decoding_options(engine, fields, max_tokens),
        "stop": fields.strings("stop", MAX_STOP_STRINGS),
        "logprobs": logprobs,
    }
    stream = fields.flag("stream") or False
    streaming = fields.object("stream_options") or Fields({})
    seed = read_seed(fields, choices)
    one_call = fields.flag("parallel_tool_calls") is False
    thinking = read_thinking(fields)
    warnings += read_warnings(engine, fields, max_tokens)
    if wanted is not None and thinking:
        thinking, warnings = False, (*warnings, "thinking was left out for response_format")
    refuse_together(wanted, tools=tools, stop=options["stop"], logprobs=logprobs)
    call = await make_call(
        engine,
        messages,
        tools,
        options,
        thinking=thinking,
        drafts=stream and bool(streaming.flag("include_drafts")),
        seed=seed,
        warnings=warnings,
        source=None if wanted is None else pinned(wanted),
    )
    return ChatRequest(
        model=model,
        calls=[call.with_seed(seed + i) for i in range(choices)],
        stream=stream,
        include_usage=bool(streaming.flag("include_usage")),
        logprobs=logprobs,
        one_call=one_call,
    )


async def chat_completions(engine: Engine, fields: Fields, request: Request) -> Any:
    asked = await read_chat(engine, fields)
    if asked.stream:
        release = engine.admit(len(asked.calls))
        return EventStream(_chunks(engine, asked), release)
    replies = await unless_gone(request, collect(engine, asked.calls))
    return JSONResponse(_completion(engine, asked, replies))


def _completion(engine: Engine, asked: ChatRequest, replies: list[Reply]) -> dict[str, Any]:
    choices = []
    for index, reply in enumerate(replies):
        if asked.one_call:
            del reply.tool_calls[1:]
        choice: dict[str, Any] = {
            "index": index,
            "message": _message(reply),
            "finish_reason": reply.openai_reason,
            "logprobs": logprobs(engine.tokenizer, reply.logprobs) if asked.logprobs else None,
            "x_diffusion": reply.facts(),
        }
        choices.append(choice)
    return {
        "id": new_id("chatcmpl", "-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": choices,
        "usage": usage(replies),
        "x_warnings": all_warnings(asked.calls[0], replies),
    }


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.thinking:
        # Two names, because clients are divided over them.
        message["reasoning"] = message["reasoning_content"] = reply.thinking
    if reply.tool_calls:
        message["tool_calls"] = [openai_call(call) for call in reply.tool_calls]
        message["content"] = reply.text or None
    if reply.malformed_calls:
        message["x_malformed_tool_calls"] = reply.malformed_calls
    return message


async def _chunks(engine: Engine, asked: ChatRequest) -> AsyncGenerator[bytes, None]:
    replies = [Reply() for _ in asked.calls]
    drafts = [DraftWriter(engine.tokenizer) for _ in asked.calls]
    head = {
        "id": new_id("chatcmpl", "-"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": asked.model,
    }

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None, **more}
        return data({**head, "choices": [choice]})

    for index in range(len(replies)):
        yield chunk(index, {"role": "assistant", "content": ""})
    try:
        async with contextlib.aclosing(interleave(engine, asked.calls)) as events:
            async for index, event in events:
                reply = replies[index]
                calls = reply.add(event)
                if isinstance(event, Draft):
                    draft = {"index": index, **drafts[index].write(event)}
                    yield data({**head, "choices": [], "x_draft": draft})
                    continue
                if isinstance(event, Ended):
                    more = {"finish_reason": reply.openai_reason, "x_diffusion": reply.facts()}
                    yield chunk(index, {}, **more)
                    continue
                scores = None
                if asked.logprobs:
                    scores = logprobs(
                        engine.tokenizer, list(zip(event.ids, event.logprobs, strict=False))
                    )
                if event.thinking:
                    named = {"reasoning": event.thinking, "reasoning_content": event.thinking}
                    yield chunk(index, named)
                if event.text or (scores and scores["content"]):
                    yield chunk(index, {"content": event.text}, logprobs=scores)
                first = len(reply.tool_calls) - len(calls)
                for position, call in enumerate(calls, first):
                    if not asked.one_call or position == 0:
                        yield chunk(
                            index, {"tool_calls": [{"index": position, **openai_call(call)}]}
                        )
                if event.malformed_calls:
                    yield chunk(index, {"x_malformed_tool_calls": list(event.malformed_calls)})
    except Exception as error:
        yield data(as_api_error(error).openai())
        engine.report(error)
        return
    tail = {"x_warnings": all_warnings(asked.calls[0], replies)}
    if asked.include_usage:
        yield data({**head, "choices": [], "usage": usage(replies), **tail})
    elif tail["x_warnings"]:
        yield data({**head, "choices": [], **tail})
    yield b"data: [DONE]\n\n"


def openai_call(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": call["id"], "type": "function", "function": function}


def usage(replies: list[Reply]) -> dict[str, Any]:
    """One prompt, however many choices were generated from it."""
    prompt = replies[0].end.finish.prompt_tokens
    completion = sum(reply.end.finish.generated_tokens for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": replies[0].end.cached_tokens},
    }


def all_warnings(call: Call, replies: list[Reply]) -> list[str]:
    several = len(replies) > 1
    return list(call.warnings) + [
        f"choice {index}: {warning}" if several else warning
        for index, reply in enumerate(replies)
        for warning in reply.warnings()
    ]


def logprobs(tokenizer: Tokenizer, scored: list[tuple[int, float]]) -> dict[str, Any]:
    """Every committed token, markers included, with its untempered log-probability."""
    content = []
    for id_, value in scored:
        token = tokenizer.decode([id_])
        content.append(
            {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
        )
    return {"content": content, "refusal": None}
