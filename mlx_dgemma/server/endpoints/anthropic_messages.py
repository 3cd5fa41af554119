"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request

from mlx_dgemma.prompt.messages import check_tools
from mlx_dgemma.server.accepted import (
    CONTENT,
    MESSAGE,
    Accepts,
    Bounds,
    chatting,
    format_of,
    shared,
)
from mlx_dgemma.server.anthropic_blocks import MESSAGE_ROLES, openai_messages
from mlx_dgemma.server.content_blocks import Segment, Segments, Step, follow
from mlx_dgemma.server.drafts import DraftWriter
from mlx_dgemma.server.engine import Engine
from mlx_dgemma.server.errors import as_api_error
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.replies import Reply, new_id
from mlx_dgemma.server.requests import Chat, ParsedRequest, read_request, respond
from mlx_dgemma.server.sse import data
from mlx_dgemma.server.structured import read_format
from mlx_dgemma.server.tool_choice import ToolUse, force
from mlx_dgemma.server.tool_kinds import anthropic_tools, check_count
from mlx_dgemma.server.wire import JsonResponse

_MESSAGE = {**MESSAGE, "properties": {"role": {"enum": list(MESSAGE_ROLES)}, "content": CONTENT}}
_TOOL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "description": {"type": "string"},
        "input_schema": {"type": "object"},
    },
    "required": ["name"],
}
# Fields about versions and storage, which change no reply.
SILENT = (
    "anthropic_version", "anthropic_beta", "betas", "container", "context_management",
    "mcp_servers", "inference_geo", "cache_control",
)  # fmt: skip


def counted(bounds: Bounds) -> dict[str, Accepts]:
    """What `/v1/messages/count_tokens` accepts."""
    kinds = {"type": Accepts("text", choices=("enabled", "adaptive", "disabled"))}
    return {
        **shared(bounds, "stop_sequences"),
        **chatting(),
        "messages": Accepts("list", schema=_MESSAGE, required=True),
        "system": Accepts(schema=CONTENT),
        "max_tokens": Accepts("limit", 1),
        "tools": Accepts("list", schema=_TOOL),
        "tool_choice": Accepts(
            "object",
            inside={
                "type": Accepts("text", choices=("auto", "any", "tool", "none")),
                "name": Accepts("text"),
                "disable_parallel_tool_use": Accepts("flag"),
            },
        ),
        "thinking": Accepts("object", inside=kinds),
        "output_config": Accepts("object", inside={"format": format_of("The reply")}),
        "output_format": format_of("The reply"),
        **dict.fromkeys(SILENT, Accepts(about="Changes no reply.")),
    }


def accepted(bounds: Bounds) -> dict[str, Accepts]:
    """What `/v1/messages` accepts."""
    return {**counted(bounds), "max_tokens": Accepts("limit", 1, required=True)}


def read_messages(fields: Fields) -> Chat:
    messages, warnings = openai_messages(fields)
    max_tokens = fields.limit("max_tokens")
    thinking = fields.object("thinking")
    mode = thinking.text("type") if thinking else None
    for silent in SILENT:
        fields.raw(silent)
    return Chat(
        messages,
        _tools(fields),
        max_tokens=max_tokens,
        stop="stop_sequences",
        thinking=mode in ("enabled", "adaptive"),
        wanted=read_format(fields.object("output_config"), "format")
        or read_format(fields, "output_format"),
        notes=warnings,
    )


async def count_tokens(engine: Engine, fields: Fields, _: Request) -> Any:
    asked = await read_request(engine, fields, partial(read_messages, fields))
    return JsonResponse({"input_tokens": len(asked.call.prompt_ids)})


async def messages(engine: Engine, fields: Fields, request: Request) -> Any:
    asked = await read_request(engine, fields, partial(read_messages, fields))
    return await respond(
        request,
        asked,
        whole=lambda: _message(engine, asked),
        events=lambda: _events(engine, asked),
    )


async def _message(engine: Engine, asked: ParsedRequest) -> dict[str, Any]:
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


async def _events(engine: Engine, asked: ParsedRequest) -> AsyncGenerator[bytes, None]:
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


def _head(asked: ParsedRequest) -> dict[str, Any]:
    return {"id": new_id("msg"), "type": "message", "role": "assistant", "model": asked.model}


def _stop_reason(reply: Reply) -> str:
    if reply.end.finish.stop_string is not None:
        return "stop_sequence"
    if not reply.whole:
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
    kind = choice.text("type") if choice else "auto"
    found = anthropic_tools(fields.items("tools") or [])
    check_count(found)
    use = ToolUse(check_tools(found.functions))
    if choice is not None:
        use = _chosen(choice, kind, use.declared, found.skipped)
    return replace(use, warnings=tuple(found.warnings))


def _chosen(
    choice: Fields, kind: str | None, declared: list[Any], skipped: Sequence[str]
) -> ToolUse:
    one_call = bool(choice.flag("disable_parallel_tool_use"))
    if kind == "none":
        return ToolUse()
    if kind == "any":
        return force(declared, None, one_call, skipped)
    if kind == "tool":
        name = choice.text("name")
        if name is None:
            raise choice.fail("name", "given as a string")
        return force(declared, name, one_call, skipped)
    return ToolUse(declared, (), one_call)
