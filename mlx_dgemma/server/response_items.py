"""Input items of the Responses dialect as chat messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.stored import StoredResponses
from mlx_dgemma.server.tool_kinds import declared_name

MESSAGE_ROLES = ("user", "assistant", "system", "developer")
_CALLS = ("function_call", "custom_tool_call", "local_shell_call", "shell_call")


@dataclass
class Conversation:
    """The request's messages. items: what they were read from, references followed. tools:
    declared on the way. warnings: what was left out."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    before: tuple[dict[str, Any], ...] = ()
    items: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Any] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_conversation(fields: Fields, stored: StoredResponses) -> Conversation:
    """`input` after what `previous_response_id` continues."""
    found = Conversation()
    previous = fields.text("previous_response_id")
    if previous:
        before = stored.get(previous)
        if before is None:
            raise ApiError(
                400,
                f"Previous response with id {previous!r} not found: this server keeps them for a "
                "while, and none with store=false; send the whole conversation instead.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        found.before = before.items
    given = fields.raw("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if items is None and previous:
        items = []
    if not isinstance(items, list):
        raise fields.fail("input", "a string or a list of items")
    if not items and not found.before:
        raise fields.fail("input", "a string or a list of at least one item")
    for item in found.before:
        _read(found, Fields(item, "previous_response_id"))
    kept: dict[str, Any] | None = None
    for i, item in enumerate(items):
        entry = Fields(item, f"input[{i}]")
        if entry.text("type") == "item_reference" or set(entry.body) == {"id"}:
            kept = stored.items() if kept is None else kept
            known = kept.get(entry.text("id") or "")
            if known is None:
                found.warnings.append(f"input[{i}] refers to an item that is not kept any more")
                continue
            entry = Fields(known, f"input[{i}]")
        found.items.append(dict(entry.body))
        _read(found, entry)
    return found


def _read(found: Conversation, entry: Fields) -> None:
    kind = entry.text("type") or "message"
    if kind == "message":
        _message(found, entry)
    elif kind == "reasoning":
        _thought(found, entry)
    elif kind in _CALLS:
        _assistant(found).setdefault("tool_calls", []).append(_call(entry, kind))
    elif kind.removesuffix("_output") in _CALLS:
        output = entry.raw("output")
        # The older shell calls are paired by the id of the item.
        identity = entry.raw("call_id") or entry.raw("id")
        result = {"role": "tool", "tool_call_id": identity, "name": entry.raw("name")}
        found.messages.append({**result, "content": _output(output)})
    elif kind == "additional_tools":
        found.tools += entry.items("tools") or []
    else:
        found.warnings.append(f"an item of type {kind} was left out: this server cannot read it")


def _message(found: Conversation, entry: Fields) -> None:
    role = entry.text("role", MESSAGE_ROLES)
    if role is None:
        raise entry.fail("role", f"one of {', '.join(MESSAGE_ROLES)}")
    content = entry.raw("content")
    if role != "assistant":
        found.messages.append({"role": role, "content": content})
        return
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    _assistant(found)["content"] += parts


def _thought(found: Conversation, entry: Fields) -> None:
    thoughts = entry.raw("content") or entry.raw("summary") or []
    listed = thoughts if isinstance(thoughts, list) else []
    texts = [t.get("text") for t in listed if isinstance(t, Mapping)]
    text = "".join(text for text in texts if isinstance(text, str))
    if text:
        message = _assistant(found)
        message["reasoning"] = message.get("reasoning", "") + text


def _call(entry: Fields, kind: str) -> dict[str, Any]:
    name: Any = kind.removesuffix("_call")
    if kind == "function_call":
        name, arguments = entry.raw("name"), entry.raw("arguments")
    elif kind == "custom_tool_call":
        name, arguments = entry.raw("name"), {"input": entry.raw("input") or ""}
    else:
        action = entry.raw("action")
        arguments = dict(action) if isinstance(action, Mapping) else {}
        arguments = {k: v for k, v in arguments.items() if v and k not in ("type", "env")}
    function = {"name": declared_name(name, entry.raw("namespace")), "arguments": arguments}
    identity = entry.raw("call_id") or entry.raw("id")
    return {"id": identity, "type": "function", "function": function}


def _output(output: Any) -> Any:
    """Text or parts as they stand; a shell's list of outcomes as JSON."""
    if isinstance(output, list) and any(
        not isinstance(part, Mapping) or "type" not in part for part in output
    ):
        return json.dumps(output, ensure_ascii=False)
    return output


def _assistant(found: Conversation) -> dict[str, Any]:
    """The assistant's message that goes on: its items in a row become one."""
    messages = found.messages
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": []})
    return messages[-1]
