"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request

from mlx_dgemma.decoding.events import Commit
from mlx_dgemma.model.scores import MOST_ALTERNATIVES
from mlx_dgemma.prompt.tokenizer import Tokenizer
from mlx_dgemma.server import canvas_reads
from mlx_dgemma.server.accepted import (
    MESSAGE,
    TOOL,
    Accepts,
    Bounds,
    format_of,
    openai_chatting,
    shared,
)
from mlx_dgemma.server.engine import Engine
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.openai_choices import answer
from mlx_dgemma.server.replies import Reply, Scored, scored
from mlx_dgemma.server.requests import Chat, read_request
from mlx_dgemma.server.sampling import read_thinking
from mlx_dgemma.server.structured import read_format
from mlx_dgemma.server.tool_choice import read_tools
from mlx_dgemma.server.tool_kinds import Origin, chat_tools, custom_input

_LEGACY = ("functions", "function_call")


def accepted(bounds: Bounds) -> dict[str, Accepts]:
    """What `/v1/chat/completions` accepts."""
    return {
        **shared(bounds),
        **openai_chatting(),
        "messages": Accepts("list", schema=MESSAGE, required=True),
        "tools": Accepts("list", schema=TOOL),
        "max_completion_tokens": Accepts("limit", 1),
        "max_tokens": Accepts("limit", 1, about="The older name of max_completion_tokens."),
        "n": Accepts("integer", 1, bounds.choices),
        "logprobs": Accepts("flag"),
        "top_logprobs": Accepts("integer", 0, MOST_ALTERNATIVES, about="Implies logprobs."),
        "response_format": format_of("The reply"),
        "modalities": Accepts("list", schema={"const": "text"}),
        **canvas_reads.accepted(bounds),
        **dict.fromkeys(_LEGACY, Accepts(schema={"type": "null"}, about="Use tools.")),
    }


def read_chat(fields: Fields) -> Chat:
    messages = fields.items("messages") or []
    for legacy in _LEGACY:
        if fields.raw(legacy) is not None:
            raise ApiError(400, f"{legacy} is not supported; use tools.", param=legacy)
    if (fields.items("modalities") or ["text"]) != ["text"]:
        raise fields.fail("modalities", "['text']")
    limit = fields.limit("max_completion_tokens")
    older = fields.limit("max_tokens")
    return Chat(
        messages,
        read_tools(fields, chat_tools),
        max_tokens=older if limit is None else limit,
        stop="stop",
        thinking=read_thinking(fields),
        wanted=read_format(fields),
        choices=fields.integer("n") or 1,
        logprobs=_read_logprobs(fields),
    )


def _read_logprobs(fields: Fields) -> int | None:
    """How many alternatives are listed beside each token; None when nothing is scored."""
    wanted = fields.flag("logprobs")
    listed = fields.integer("top_logprobs") or 0
    return listed if wanted or listed else None


async def chat_completions(engine: Engine, fields: Fields, request: Request) -> Any:
    canvas = canvas_reads.read_canvas_request(engine, fields)
    as_ids = fields.flag("return_tokens_as_token_ids") or False
    asked = await read_request(engine, fields, partial(read_chat, fields))
    if canvas is not None:
        canvas_reads.refuse_forms(asked.call)
        asked = replace(asked, calls=[replace(c, source=canvas.source) for c in asked.calls])

    def listed(tokens: list[Scored]) -> dict[str, Any] | None:
        if not asked.logprobs:
            return None
        return logprobs(engine.tokenizer, tokens, as_ids=as_ids, all_places=canvas is not None)

    def choice(reply: Reply) -> dict[str, Any]:
        return {
            "message": _message(reply, asked.origins),
            "finish_reason": reply.openai_reason,
            "logprobs": listed(reply.logprobs),
        }

    def write(reply: Reply, event: Commit, calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        scores = listed(scored(event))
        if event.thinking:
            yield {"delta": _thought(event.thinking)}
        if event.text or (scores and scores["content"]):
            yield {"delta": {"content": event.text}, "logprobs": scores}
        for position, call in enumerate(calls, len(reply.tool_calls) - len(calls)):
            yield {
                "delta": {"tool_calls": [{"index": position, **openai_call(call, asked.origins)}]}
            }
        if event.malformed_calls:
            yield {"delta": {"x_malformed_tool_calls": list(event.malformed_calls)}}

    return await answer(
        engine,
        request,
        asked,
        prefix="chatcmpl",
        kinds=("chat.completion", "chat.completion.chunk"),
        choice=choice,
        first={"delta": {"role": "assistant", "content": ""}},
        write=write,
        last=lambda reply: {"delta": {}, "finish_reason": reply.openai_reason},
    )


def _message(reply: Reply, origins: Mapping[str, Origin]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.thinking:
        message |= _thought(reply.thinking)
    if reply.tool_calls:
        message["tool_calls"] = [openai_call(call, origins) for call in reply.tool_calls]
        message["content"] = reply.text or None
    if reply.malformed_calls:
        message["x_malformed_tool_calls"] = reply.malformed_calls
    return message


def _thought(text: str) -> dict[str, str]:
    """Two names, because clients are divided over them."""
    return {"reasoning": text, "reasoning_content": text}


def openai_call(call: dict[str, Any], origins: Mapping[str, Origin]) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    if call["name"] in origins:
        custom = {"name": call["name"], "input": custom_input(arguments)}
        return {"id": call["id"], "type": "custom", "custom": custom}
    function = {"name": call["name"], "arguments": arguments}
    return {"id": call["id"], "type": "function", "function": function}


def logprobs(
    tokenizer: Tokenizer, tokens: list[Scored], *, as_ids: bool, all_places: bool
) -> dict[str, Any]:
    """Every token, markers included, with its untempered log-probability.

    as_ids: tokens are named by their ids. all_places: what fills a canvas is listed, too, though it
    is no part of a reply.
    """

    def entry(id_: int, logprob: float) -> dict[str, Any]:
        token = tokenizer.decode([id_])
        name = f"token_id:{id_}" if as_ids else token
        return {"token": name, "logprob": logprob, "bytes": list(token.encode())}

    content = [
        {**entry(one.id, one.logprob), "top_logprobs": [entry(*two) for two in one.alternatives]}
        for one in tokens
        if all_places or one.id != tokenizer.ids.get("pad")
    ]
    return {"content": content, "refusal": None}
