"""POST /v1/responses: what agents use of OpenAI's newer dialect, streaming events included."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request

from mlx_dgemma.server.accepted import CONTENT, Accepts, Bounds, format_of, openai_chatting, shared
from mlx_dgemma.server.content_blocks import Segment, Segments, Step, follow
from mlx_dgemma.server.drafts import DraftWriter
from mlx_dgemma.server.engine import Engine
from mlx_dgemma.server.errors import ApiError, as_api_error
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.replies import Reply, new_id
from mlx_dgemma.server.requests import Chat, ParsedRequest, read_request, respond
from mlx_dgemma.server.response_items import MESSAGE_ROLES, Conversation, read_conversation
from mlx_dgemma.server.sampling import read_thinking
from mlx_dgemma.server.sse import data
from mlx_dgemma.server.stored import StoredResponses
from mlx_dgemma.server.structured import read_format
from mlx_dgemma.server.tool_choice import read_tools
from mlx_dgemma.server.tool_kinds import Origin, call_item, responses_tools

# Fields that name what only a provider keeps, and what to send in their place.
_ELSEWHERE = {
    "conversation": "send the messages in input, or continue a response by previous_response_id",
    "prompt": "send its text in instructions and input",
    "background": "leave it out, and stream the response to see it grow",
}
MOST_METADATA = 64


def accepted(bounds: Bounds) -> dict[str, Accepts]:
    """What `/v1/responses` accepts."""
    message = {
        "type": "object",
        "properties": {
            "type": {"const": "message"},
            "role": {"enum": list(MESSAGE_ROLES)},
            "content": CONTENT,
        },
        "required": ["role", "content"],
    }
    other = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
    items = {"type": "array", "items": {"anyOf": [message, other]}}
    tool = {
        "type": "object",
        "properties": {"type": {"type": "string"}, "name": {"type": "string", "minLength": 1}},
        "required": ["type", "name"],
    }
    return {
        **shared(bounds, stop=None),
        **openai_chatting(),
        "input": Accepts(schema={"anyOf": [{"type": "string"}, items]}),
        "instructions": Accepts("text"),
        "previous_response_id": Accepts("text"),
        "tools": Accepts("list", schema=tool),
        "max_output_tokens": Accepts("limit", 1),
        "metadata": Accepts("object", about=f"It comes back; at most {MOST_METADATA} pairs."),
        "text": Accepts("object", inside={"format": format_of("The reply")}),
        **dict.fromkeys(_ELSEWHERE, Accepts(schema={"enum": [None, False]})),
    }


def read_response(fields: Fields, conversation: Conversation) -> Chat:
    metadata = fields.object("metadata")
    if metadata is not None and len(metadata.body) > MOST_METADATA:
        raise fields.fail("metadata", f"an object of at most {MOST_METADATA} pairs")
    for name, instead in _ELSEWHERE.items():
        if fields.raw(name):
            raise ApiError(400, f"{name} is not supported: {instead}.", param=name)
    instructions = fields.text("instructions")
    messages = list(conversation.messages)
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    return Chat(
        messages,
        read_tools(fields, responses_tools, conversation.tools),
        max_tokens=fields.limit("max_output_tokens"),
        stop=None,
        thinking=read_thinking(fields),
        wanted=read_format(fields.object("text"), "format"),
        notes=conversation.warnings,
    )


def _echoed(asked: ParsedRequest, fields: Fields) -> dict[str, Any]:
    """What the response object repeats of the request."""
    temperature = fields.raw("temperature")
    metadata = fields.object("metadata")
    return {
        "model": asked.model,
        "instructions": fields.raw("instructions"),
        "max_output_tokens": fields.raw("max_output_tokens"),
        "metadata": {} if metadata is None else metadata.body,
        "parallel_tool_calls": not asked.one_call,
        "temperature": 1.0 if temperature is None else temperature,
        "text": fields.raw("text") or {"format": {"type": "text"}},
        "tool_choice": fields.raw("tool_choice") or "auto",
        "tools": fields.raw("tools") or [],
        "top_p": None,
        "previous_response_id": fields.raw("previous_response_id"),
        "store": fields.raw("store") is not False,
    }


async def responses(
    stored: StoredResponses, engine: Engine, fields: Fields, request: Request
) -> Any:
    conversation = await asyncio.to_thread(read_conversation, fields, stored)
    read = partial(read_response, fields, conversation)
    asked = await read_request(engine, fields, read)
    head = {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "error": None,
        "incomplete_details": None,
        **_echoed(asked, fields),
    }

    def keep(whole: dict[str, Any]) -> None:
        if head["store"]:
            stored.put(whole, conversation.before, conversation.items)

    return await respond(
        request,
        asked,
        whole=lambda: _response(engine, asked, head, keep),
        events=lambda: _events(engine, asked, head, keep),
    )


Keep = Callable[[dict[str, Any]], None]


async def _response(
    engine: Engine, asked: ParsedRequest, head: dict[str, Any], keep: Keep
) -> dict[str, Any]:
    reply, segments, items = Reply(one_call=asked.one_call), Segments(), _Items(asked.origins)
    async for _ in follow(engine, asked.call, reply, segments):
        pass
    whole = {**head, **_finished(engine, asked, reply, segments, items)}
    await asyncio.to_thread(keep, whole)
    return whole


class _Items:
    """Output items; each has the same id whenever it is written."""

    def __init__(self, origins: Mapping[str, Origin]) -> None:
        self._origins = origins
        self._ids: dict[int, str] = {}

    def identity(self, index: int, segment: Segment) -> str:
        prefix = {"thinking": "rs", "text": "msg", "call": "fc"}[segment.kind]
        return self._ids.setdefault(index, new_id(prefix))

    def item(
        self, index: int, segment: Segment, status: str, *, empty: bool = False
    ) -> dict[str, Any]:
        head = {"id": self.identity(index, segment), "status": status}
        parts = [] if empty else [_part(segment)]
        if segment.kind == "thinking":
            return {"type": "reasoning", **head, "summary": [], "content": parts}
        if segment.kind == "text":
            return {"type": "message", **head, "role": "assistant", "content": parts}
        call = self.call(segment)
        if empty:
            call |= {name: "" for name in ("arguments", "input") if name in call}
        return {**head, **call, "call_id": segment.id}

    def call(self, segment: Segment) -> dict[str, Any]:
        return call_item(self._origins.get(segment.name), segment.name, segment.text)


async def _events(
    engine: Engine, asked: ParsedRequest, head: dict[str, Any], keep: Keep
) -> AsyncGenerator[bytes, None]:
    number = -1

    def event(kind: str, **body: Any) -> bytes:
        nonlocal number
        number += 1
        return data({"type": kind, "sequence_number": number, **body}, kind)

    reply, segments, items = Reply(one_call=asked.one_call), Segments(), _Items(asked.origins)
    drafts = DraftWriter(engine.tokenizer)
    started = {**head, "status": "in_progress", "output": [], "usage": None}
    yield event("response.created", response=started)
    yield event("response.in_progress", response=started)
    try:
        async with contextlib.aclosing(follow(engine, asked.call, reply, segments)) as steps:
            async for step in steps:
                if step.draft is not None:
                    yield event("response.x_draft", **drafts.write(step.draft))
                elif step.segment is not None:
                    for kind, body in _item_events(step, step.segment, items):
                        yield event(kind, **body)
        whole = {**head, **_finished(engine, asked, reply, segments, items)}
        await asyncio.to_thread(keep, whole)
        yield event(f"response.{whole['status']}", response=whole)
    except Exception as error:
        engine.report(error)
        problem = as_api_error(error)
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        failure = {"code": code, "message": problem.message}
        yield event("response.failed", response={**started, "status": "failed", "error": failure})


def _item_events(step: Step, segment: Segment, items: _Items) -> list[tuple[str, dict[str, Any]]]:
    index = step.index
    at: dict[str, Any] = {"item_id": items.identity(index, segment), "output_index": index}
    if step.change == "open":
        item = items.item(index, segment, "in_progress", empty=True)
        opened = ("response.output_item.added", {"output_index": index, "item": item})
        if segment.kind == "call":
            return [opened]
        part = {**_part(segment), "text": ""}
        return [opened, ("response.content_part.added", {**at, "content_index": 0, "part": part})]
    item = items.item(index, segment, "completed")
    closed = ("response.output_item.done", {"output_index": index, "item": item})
    if segment.kind == "call":
        return [] if step.change == "grow" else [*_input_events(at, item), closed]
    stem = "response.reasoning_text" if segment.kind == "thinking" else "response.output_text"
    at["content_index"] = 0
    more: dict[str, Any] = {"logprobs": []} if segment.kind == "text" else {}
    if step.change == "grow":
        return [(f"{stem}.delta", {**at, "delta": step.delta, **more})]
    done = (f"{stem}.done", {**at, "text": segment.text, **more})
    return [done, ("response.content_part.done", {**at, "part": _part(segment)}), closed]


def _input_events(at: dict[str, Any], item: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A call's input, which comes in one piece; shells have no events for it."""
    for stem, name in (
        ("response.function_call_arguments", "arguments"),
        ("response.custom_tool_call_input", "input"),
    ):
        if name in item:
            done = {**at, name: item[name]} | (
                {"name": item["name"]} if name == "arguments" else {}
            )
            return [(f"{stem}.delta", {**at, "delta": item[name]}), (f"{stem}.done", done)]
    return []


def _part(segment: Segment) -> dict[str, Any]:
    if segment.kind == "thinking":
        return {"type": "reasoning_text", "text": segment.text}
    return {"type": "output_text", "text": segment.text, "annotations": [], "logprobs": []}


def _finished(
    engine: Engine, asked: ParsedRequest, reply: Reply, segments: Segments, items: _Items
) -> dict[str, Any]:
    finish = reply.end.finish
    whole = reply.whole
    usage = {
        "input_tokens": finish.prompt_tokens,
        "input_tokens_details": {"cached_tokens": reply.end.cached_tokens},
        "output_tokens": finish.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": len(engine.tokenizer.encode(reply.thinking))},
        "total_tokens": finish.prompt_tokens + finish.generated_tokens,
    }
    return {
        "status": "completed" if whole else "incomplete",
        "incomplete_details": None if whole else {"reason": "max_output_tokens"},
        "output": [
            items.item(index, segment, "completed") for index, segment in enumerate(segments.row)
        ],
        "usage": usage,
        "x_diffusion": reply.facts(),
        "x_warnings": [*asked.call.warnings, *reply.warnings()],
    }
