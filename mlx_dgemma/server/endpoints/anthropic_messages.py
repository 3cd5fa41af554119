"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request

from mlx_dgemma.prompt.messages import check_tools
from mlx_dgemma.server.content_blocks import Segment, Segments, Step, follow
from mlx_dgemma.server.drafts import DraftWriter
from mlx_dgemma.server.engine import Engine
from mlx_dgemma.server.errors import ApiError, as_api_error
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.replies import Reply, new_id
from mlx_dgemma.server.requests import Asked, read_request, respond
from mlx_dgemma.server.sse import data
from mlx_dgemma.server.tool_choice import ToolUse, force
from mlx_dgemma.server.wire import JsonResponse

# Fields about versions and storage, which change no reply.
SILENT = (
    "anthropic_version", "anthropic_beta", "betas", "output_config", "container",
    "context_management",
)  # fmt: skip


async def read_messages(engine: Engine, fields: Fields, *, counting: bool = False) -> Asked:
    messages = openai_messages(fields)
    max_tokens = fields.integer("max_tokens", 1)
    if max_tokens is None and not counting:
        raise fields.fail("max_tokens", "given as a whole number, at least 1")
    thinking = fields.object("thinking")
    mode = thinking.text("type", ("enabled", "adaptive", "disabled")) if thinking else None
    for silent in SILENT:
        fields.raw(silent)
    return await read_request(
        engine,
        fields,
        messages,
        _tools(fields),
        max_tokens=max_tokens,
        stop="stop_sequences",
        thinking=mode in ("enabled", "adaptive"),
    )


async def count_tokens(engine: Engine, fields: Fields, _: Request) -> Any:
    asked = await read_messages(engine, fields, counting=True)
    return JsonResponse({"input_tokens": len(asked.call.prompt_ids)})


async def messages(engine: Engine, fields: Fields, request: Request) -> Any:
    asked = await read_messages(engine, fields)
    return await respond(
        request,
        asked,
        whole=lambda: _message(engine, asked),
        events=lambda: _events(engine, asked),
    )


async def _message(engine: Engine, asked: Asked) -> dict[str, Any]:
    reply, segments = Reply(one_call=asked.one_call), Segments()
    async for _ in follow(engine, asked.call, reply, segments):
        pass
    return {
        **_head(asked),
        "content": [_block(segment) for segment in segments.row],
        "stop_reason": _stop_reason(reply),
        "stop_sequence": reply.end.finish.stop_string,
        "usage": _usage(reply),
        "x_diffusion": reply.facts(),
        "x_warnings": [*asked.call.warnings, *reply.warnings()],
    }


async def _events(engine: Engine, asked: Asked) -> AsyncGenerator[bytes, None]:
    def event(kind: str, **body: Any) -> bytes:
        return data({"type": kind, **body}, kind)

    reply, segments = Reply(one_call=asked.one_call), Segments()
    drafts = DraftWriter(engine.tokenizer)
    counts = {"input_tokens": len(asked.call.prompt_ids), "output_tokens": 0}
    started = {**_head(asked), "content": [], "stop_reason": None, "stop_sequence": None}
    yield event("message_start", message={**started, "usage": counts})
    try:
        async with contextlib.aclosing(follow(engine, asked.call, reply, segments)) as steps:
            async for step in steps:
                if step.draft is not None:
                    yield event("x_draft", **drafts.write(step.draft))
                elif step.segment is not None:
                    yield event(**_block_event(step, step.segment))
        delta = {
            "stop_reason": _stop_reason(reply),
            "stop_sequence": reply.end.finish.stop_string,
        }
        extra = {
            "x_diffusion": reply.facts(),
            "x_warnings": [*asked.call.warnings, *reply.warnings()],
        }
        yield event("message_delta", delta=delta, usage=_usage(reply), **extra)
        yield event("message_stop")
    except Exception as error:
        engine.report(error)
        yield data(as_api_error(error).anthropic(), "error")


def _block_event(step: Step, segment: Segment) -> dict[str, Any]:
    if step.change == "open":
        empty = _block(Segment(segment.kind, "", segment.id, segment.name))
        return {"kind": "content_block_start", "index": step.index, "content_block": empty}
    if step.change == "close":
        return {"kind": "content_block_stop", "index": step.index}
    delta = {
        "thinking": {"type": "thinking_delta", "thinking": step.delta},
        "text": {"type": "text_delta", "text": step.delta},
        "call": {"type": "input_json_delta", "partial_json": step.delta},
    }[segment.kind]
    return {"kind": "content_block_delta", "index": step.index, "delta": delta}


def _block(segment: Segment) -> dict[str, Any]:
    if segment.kind == "thinking":
        return {"type": "thinking", "thinking": segment.text, "signature": ""}
    if segment.kind == "text":
        return {"type": "text", "text": segment.text}
    arguments = json.loads(segment.text) if segment.text else {}
    return {"type": "tool_use", "id": segment.id, "name": segment.name, "input": arguments}


def _head(asked: Asked) -> dict[str, Any]:
    return {"id": new_id("msg"), "type": "message", "role": "assistant", "model": asked.model}


def _stop_reason(reply: Reply) -> str:
    if reply.end.finish.stop_string is not None:
        return "stop_sequence"
    if reply.end.finish.reason != "stop":
        return "max_tokens"
    return "tool_use" if reply.tool_calls else "end_turn"


def _usage(reply: Reply) -> dict[str, int]:
    """Anthropic counts cached prompt tokens apart from the others."""
    cached = reply.end.cached_tokens
    return {
        "input_tokens": reply.end.finish.prompt_tokens - cached,
        "output_tokens": reply.end.finish.generated_tokens,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }


def _tools(fields: Fields) -> ToolUse:
    choice = fields.object("tool_choice")
    kind = choice.text("type", ("auto", "any", "tool", "none")) if choice else "auto"
    declared = []
    for i, tool in enumerate(fields.items("tools") or []):
        entry = Fields(tool, f"tools[{i}]")
        if entry.text("type") not in (None, "custom"):
            raise entry.fail("type", "'custom': this server runs no tools itself")
        function = {
            "name": entry.text("name"),
            "description": entry.text("description") or "",
            "parameters": entry.raw("input_schema") or {},
        }
        declared.append({"type": "function", "function": function})
    declared = check_tools(declared)
    if choice is None:
        return ToolUse(declared)
    one_call = bool(choice.flag("disable_parallel_tool_use"))
    if kind == "none":
        return ToolUse()
    if kind == "any":
        return force(declared, None, one_call)
    if kind == "tool":
        name = choice.text("name")
        if name is None:
            raise choice.fail("name", "given as a string")
        return force(declared, name, one_call)
    return ToolUse(declared, (), one_call)


def openai_messages(fields: Fields) -> list[dict[str, Any]]:
    """The conversation in OpenAI's form, which the chat template reads."""
    converted: list[dict[str, Any]] = []
    system = fields.raw("system")
    if system:
        converted.append({"role": "system", "content": _texts(system, "system")})
    messages = fields.items("messages")
    if messages is None:
        raise fields.fail("messages", "given as a list")
    for i, message in enumerate(messages):
        entry = Fields(message, f"messages[{i}]")
        role = entry.text("role", ("user", "assistant", "system"))
        content = entry.raw("content")
        if isinstance(content, str):
            converted.append({"role": role, "content": content})
            continue
        if not isinstance(content, list):
            raise entry.fail("content", "a string or a list of blocks")
        blocks = [Fields(block, f"messages[{i}].content[{j}]") for j, block in enumerate(content)]
        converted += _assistant(blocks) if role == "assistant" else _user(blocks, role)
    return converted


def _user(blocks: list[Fields], role: str | None) -> list[dict[str, Any]]:
    """Tool results become messages of their own, before what the user says beside them."""
    results, parts = [], []
    for block in blocks:
        kind = block.text("type")
        if kind == "tool_result":
            result = {"role": "tool", "tool_call_id": block.text("tool_use_id")}
            body = _result(block.raw("content") or "", block.path("content"))
            results.append({**result, "content": body})
        elif kind == "text":
            parts.append({"type": "text", "text": block.text("text") or ""})
        elif kind == "image":
            parts.append(_image(block))
        else:
            raise block.fail("type", "text, image or tool_result")
    return results + ([{"role": role, "content": parts}] if parts or not results else [])


def _result(value: Any, where: str) -> str | list[dict[str, Any]]:
    """What a tool gave: text, or parts when there is an image among them."""
    blocks = value if isinstance(value, list) else []
    kinds = [block.get("type") if isinstance(block, Mapping) else None for block in blocks]
    if "image" not in kinds:
        return _texts(value, where)
    parts = []
    for i, item in enumerate(value):
        block = Fields(item, f"{where}[{i}]")
        if block.text("type", ("text", "image")) == "image":
            parts.append(_image(block))
        else:
            parts.append({"type": "text", "text": block.text("text") or ""})
    return parts


def _image(block: Fields) -> dict[str, Any]:
    """An image block as OpenAI's part."""
    source = block.object("source")
    if source is None:
        raise block.fail("source", "given as {'type': 'base64', ...} or {'type': 'url', ...}")
    if source.text("type", ("base64", "url")) == "url":
        return {"type": "image", "url": source.text("url") or ""}
    kind = source.text("media_type") or "image/png"
    return {"type": "image", "url": f"data:{kind};base64,{source.text('data') or ''}"}


def _assistant(blocks: list[Fields]) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls = []
    for block in blocks:
        kind = block.text("type")
        if kind == "text":
            message["content"] += block.text("text") or ""
        elif kind == "thinking":
            message["reasoning"] = message.get("reasoning", "") + (block.text("thinking") or "")
        elif kind == "tool_use":
            function = {"name": block.text("name"), "arguments": block.raw("input") or {}}
            calls.append({"id": block.text("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            raise block.fail("type", "text, thinking or tool_use")
    return [{**message, "tool_calls": calls} if calls else message]


def _texts(value: Any, where: str) -> str:
    """A string, or the texts of a list of blocks joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ApiError(400, f"{where} must be a string or a list of text blocks.", param=where)
    texts = []
    for i, item in enumerate(value):
        block = Fields(item, f"{where}[{i}]")
        block.text("type", ("text",))
        texts.append(block.text("text") or "")
    return "\n".join(texts)
