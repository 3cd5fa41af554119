"""POST /v1/responses: what agents use of OpenAI's newer dialect, streaming events included."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request

from mlx_dgemma.server.content_blocks import Segment, Segments, Step, follow
from mlx_dgemma.server.drafts import DraftWriter
from mlx_dgemma.server.engine import Engine
from mlx_dgemma.server.errors import ApiError, as_api_error
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.replies import Reply, new_id
from mlx_dgemma.server.requests import Asked, read_request, respond
from mlx_dgemma.server.sampling import read_thinking
from mlx_dgemma.server.sse import data
from mlx_dgemma.server.structured import read_format
from mlx_dgemma.server.tool_choice import read_tools


async def read_response(engine: Engine, fields: Fields) -> Asked:
    for name in ("previous_response_id", "conversation", "prompt", "background"):
        if fields.raw(name):
            raise ApiError(
                400, f"{name} is not supported: this server keeps no responses.", param=name
            )
    instructions = fields.text("instructions")
    items = fields.raw("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise fields.fail("input", "a string or a list of items")
    messages = chat_messages(items)
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    return await read_request(
        engine,
        fields,
        messages,
        read_tools(fields, _declaration),
        max_tokens=fields.integer("max_output_tokens", 1),
        stop=None,
        thinking=read_thinking(fields),
        schema=read_format(fields.object("text"), "format"),
    )


def _echoed(asked: Asked, fields: Fields) -> dict[str, Any]:
    """What the response object repeats of the request."""
    temperature = fields.raw("temperature")
    return {
        "model": asked.model,
        "instructions": fields.raw("instructions"),
        "max_output_tokens": fields.raw("max_output_tokens"),
        "metadata": fields.raw("metadata") or {},
        "parallel_tool_calls": not asked.one_call,
        "temperature": 1.0 if temperature is None else temperature,
        "text": fields.raw("text") or {"format": {"type": "text"}},
        "tool_choice": fields.raw("tool_choice") or "auto",
        "tools": fields.raw("tools") or [],
        "top_p": None,
        "store": False,
    }


async def responses(engine: Engine, fields: Fields, request: Request) -> Any:
    asked = await read_response(engine, fields)
    head = {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "error": None,
        "incomplete_details": None,
        **_echoed(asked, fields),
    }
    return await respond(
        request,
        asked,
        whole=lambda: _response(engine, asked, head),
        events=lambda: _events(engine, asked, head),
    )


async def _response(engine: Engine, asked: Asked, head: dict[str, Any]) -> dict[str, Any]:
    reply, segments, ids = Reply(one_call=asked.one_call), Segments(), _Ids()
    async for _ in follow(engine, asked.call, reply, segments):
        pass
    return {**head, **_finished(engine, asked, reply, segments, ids)}


class _Ids:
    """Item ids, the same each time a segment is written."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def of(self, index: int, segment: Segment) -> str:
        prefix = {"thinking": "rs", "text": "msg", "call": "fc"}[segment.kind]
        return self._known.setdefault(index, new_id(prefix))


async def _events(
    engine: Engine, asked: Asked, head: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    number = -1

    def event(kind: str, **body: Any) -> bytes:
        nonlocal number
        number += 1
        return data({"type": kind, "sequence_number": number, **body}, kind)

    reply, segments, ids = Reply(one_call=asked.one_call), Segments(), _Ids()
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
                    for kind, body in _item_events(step, step.segment, ids):
                        yield event(kind, **body)
        whole = {**head, **_finished(engine, asked, reply, segments, ids)}
        yield event(f"response.{whole['status']}", response=whole)
    except Exception as error:
        engine.report(error)
        problem = as_api_error(error)
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        failure = {"code": code, "message": problem.message}
        yield event("response.failed", response={**started, "status": "failed", "error": failure})


def _item_events(step: Step, segment: Segment, ids: _Ids) -> list[tuple[str, dict[str, Any]]]:
    item_id = ids.of(step.index, segment)
    at: dict[str, Any] = {"item_id": item_id, "output_index": step.index}
    stem, part_field = {
        "thinking": ("response.reasoning_text", "text"),
        "text": ("response.output_text", "text"),
        "call": ("response.function_call_arguments", "arguments"),
    }[segment.kind]
    if segment.kind != "call":
        at["content_index"] = 0
    more: dict[str, Any] = {"logprobs": []} if segment.kind == "text" else {}
    part = _part(segment)
    if step.change == "grow":
        return [(f"{stem}.delta", {**at, "delta": step.delta, **more})]
    if step.change == "open":
        item = _item(segment, item_id, "in_progress", empty=True)
        opened = ("response.output_item.added", {"output_index": step.index, "item": item})
        if segment.kind == "call":
            return [opened]
        return [opened, ("response.content_part.added", {**at, "part": {**part, "text": ""}})]
    done = [(f"{stem}.done", {**at, part_field: segment.text, **more})]
    if segment.kind == "call":
        done[0][1]["name"] = segment.name
    else:
        done.append(("response.content_part.done", {**at, "part": part}))
    item = _item(segment, item_id, "completed")
    return [*done, ("response.output_item.done", {"output_index": step.index, "item": item})]


def _part(segment: Segment) -> dict[str, Any]:
    if segment.kind == "thinking":
        return {"type": "reasoning_text", "text": segment.text}
    return {"type": "output_text", "text": segment.text, "annotations": [], "logprobs": []}


def _item(segment: Segment, id_: str, status: str, *, empty: bool = False) -> dict[str, Any]:
    parts = [] if empty else [_part(segment)]
    if segment.kind == "thinking":
        return {"type": "reasoning", "id": id_, "summary": [], "content": parts, "status": status}
    if segment.kind == "text":
        role = "assistant"
        return {"type": "message", "id": id_, "role": role, "content": parts, "status": status}
    return {
        "type": "function_call",
        "id": id_,
        "call_id": segment.id,
        "name": segment.name,
        "arguments": "" if empty else segment.text,
        "status": status,
    }


def _finished(
    engine: Engine, asked: Asked, reply: Reply, segments: Segments, ids: _Ids
) -> dict[str, Any]:
    finish = reply.end.finish
    whole = finish.reason == "stop"
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
            _item(segment, ids.of(index, segment), "completed")
            for index, segment in enumerate(segments.row)
        ],
        "usage": usage,
        "x_diffusion": reply.facts(),
        "x_warnings": [*asked.call.warnings, *reply.warnings()],
    }


def _declaration(tool: Any, index: int) -> dict[str, Any]:
    """A flat function tool in the nested form of chat completions."""
    entry = Fields(tool, f"tools[{index}]")
    if entry.text("type") != "function":
        raise entry.fail("type", "'function': this server runs no tools itself")
    function = {
        "name": entry.text("name"),
        "description": entry.text("description") or "",
        "parameters": entry.raw("parameters") or {},
    }
    return {"type": "function", "function": function}


def chat_messages(items: list[Any]) -> list[dict[str, Any]]:
    """Input items as chat messages; an assistant's items in a row become one message."""
    converted: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        entry = Fields(item, f"input[{i}]")
        kind = entry.text("type") or "message"
        if kind == "message":
            role = entry.text("role", ("user", "assistant", "system", "developer"))
            if role != "assistant":
                converted.append({"role": role, "content": entry.raw("content")})
                continue
            content = entry.raw("content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            _assistant(converted)["content"] += parts
        elif kind == "reasoning":
            thoughts = entry.items("content") or entry.items("summary") or []
            texts = [Fields(t, entry.path("content")).text("text") or "" for t in thoughts]
            _assistant(converted)["reasoning"] = "".join(texts)
        elif kind == "function_call":
            function = {"name": entry.text("name"), "arguments": entry.raw("arguments")}
            call = {"id": entry.text("call_id"), "type": "function", "function": function}
            _assistant(converted).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            result = {"role": "tool", "tool_call_id": entry.text("call_id")}
            converted.append({**result, "content": entry.raw("output")})
        else:
            raise entry.fail("type", "message, reasoning, function_call or function_call_output")
    return converted


def _assistant(converted: list[dict[str, Any]]) -> dict[str, Any]:
    if not converted or converted[-1]["role"] != "assistant":
        converted.append({"role": "assistant", "content": []})
    return converted[-1]
