"""Anthropic's messages and content blocks as chat messages.

A block that cannot be read becomes a placeholder with its text, and a warning; in the newest
question, which its author can still fix, one that is malformed is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.history import newest_question, placeholder

MESSAGE_ROLES = ("user", "assistant", "system")
Parts = list[dict[str, Any]]
Block = tuple[Any, str]  # as it was sent, and where it stands


def openai_messages(fields: Fields) -> tuple[list[dict[str, Any]], list[str]]:
    """The conversation in OpenAI's form, which the chat template reads, and warnings."""
    warnings: list[str] = []
    converted: list[dict[str, Any]] = []
    system = fields.raw("system")
    if system:
        converted.append({"role": "system", "content": _content(system, "system", warnings)})
    messages = fields.items("messages") or []
    newest = newest_question(messages)
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        entry = Fields(message, where)
        role = entry.text("role", MESSAGE_ROLES)
        content = entry.raw("content")
        if content is None or isinstance(content, str):
            converted.append({"role": role, "content": content or ""})
            continue
        if not isinstance(content, list):
            if i == newest:
                raise entry.fail("content", "a string or a list of blocks")
            content = [content]
        blocks = [(block, f"{where}.content[{j}]") for j, block in enumerate(content)]
        if role == "assistant":
            converted.append(_assistant(blocks, warnings))
        else:
            converted += _user(blocks, role, warnings, newest=i == newest)
    return converted, warnings


def _user(
    blocks: list[Block], role: str | None, warnings: list[str], *, newest: bool
) -> list[dict[str, Any]]:
    """Tool results become messages of their own, before what the user says beside them."""
    results, parts = [], []
    for block, where in blocks:
        if _kind(block) != "tool_result":
            part = _part(Fields(block, where), warnings) if newest else _old(block, where, warnings)
            parts.append(part)
            continue
        body = _result(block.get("content"), f"{where}.content", warnings)
        if block.get("is_error") is True:
            body = _marked_as_error(body)
        result = {"role": "tool", "tool_call_id": block.get("tool_use_id")}
        results.append({**result, "content": body})
    return results + ([{"role": role, "content": parts}] if parts or not results else [])


def _marked_as_error(body: str | Parts) -> str | Parts:
    if isinstance(body, str):
        return body if body.lower().startswith("error") else f"Error: {body}"
    return [{"type": "text", "text": "Error:"}, *body]


def _assistant(blocks: list[Block], warnings: list[str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": []}
    calls = []
    for block, where in blocks:
        kind = _kind(block)
        if kind == "thinking":
            thought = block.get("thinking")
            message["reasoning"] = message.get("reasoning", "") + (
                thought if isinstance(thought, str) else ""
            )
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            message["content"].append(_old(block, where, warnings))
    return {**message, "tool_calls": calls} if calls else message


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, Mapping) else None


def _result(value: Any, where: str, warnings: list[str]) -> str | Parts:
    """What a tool gave: text, blocks, or any JSON value, which is read as it is written."""
    if isinstance(value, list):
        return _joined([_old(item, f"{where}[{i}]", warnings) for i, item in enumerate(value)])
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def _old(block: Any, where: str, warnings: list[str]) -> dict[str, Any]:
    """A block that nobody could take back, as a part: malformed, it is read as far as it can be."""
    if isinstance(block, str):
        return {"type": "text", "text": block}
    try:
        return _part(Fields(block, where), warnings)
    except ApiError as error:
        warnings.append(f"{error.message.removesuffix('.')}, and was read as text")
        if isinstance(_kind(block), str) and _kind(block) != "text":
            return placeholder(block)
        return {"type": "text", "text": json.dumps(block, ensure_ascii=False)}


def _content(value: Any, where: str, warnings: list[str]) -> str | Parts:
    """A string, or a list of blocks as parts: one text where there is nothing else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ApiError(400, f"{where} must be a string or a list of blocks.", param=where)
    return _joined([_part(Fields(item, f"{where}[{i}]"), warnings) for i, item in enumerate(value)])


def _joined(parts: Parts) -> str | Parts:
    if any(part["type"] != "text" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def _part(block: Fields, warnings: list[str]) -> dict[str, Any]:
    """A block as OpenAI's part."""
    kind = block.text("type")
    if kind == "text":
        return {"type": "text", "text": block.text("text") or ""}
    if kind == "image" and not _is_kept_elsewhere(block):
        return _image(block)
    if kind is None:
        raise block.fail("type", "given as a string")
    document = block.raw("source") if kind == "document" else None
    if isinstance(document, dict) and document.get("type") in ("text", "content"):
        given = document.get("data") or document.get("content") or ""
        text = _content(given, block.path("source"), warnings)
        if isinstance(text, str):
            title = block.text("title")
            return {"type": "text", "text": f"{title}\n{text}" if title else text}
    warnings.append(f"{block.path('type')} is {kind}, which this server cannot read")
    return placeholder(block.body)


def _is_kept_elsewhere(block: Fields) -> bool:
    """Whether an image is a file that a provider keeps, and not a part of the request."""
    source = block.raw("source")
    kind = source.get("type") if isinstance(source, dict) else None
    return isinstance(kind, str) and kind not in ("base64", "url")


def _image(block: Fields) -> dict[str, Any]:
    source = block.object("source")
    kind = None if source is None else source.text("type")
    if source is None or kind is None:
        raise block.fail("source", "given as {'type': 'base64', ...} or {'type': 'url', ...}")
    if kind == "url":
        return {"type": "image", "url": source.text("url") or ""}
    media = source.text("media_type") or "image/png"
    return {"type": "image", "url": f"data:{media};base64,{source.text('data') or ''}"}
