"""Checks messages and tools in OpenAI's form and brings their dialects to what templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.declarations import plain_parameters

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
VIDEO_PARTS = ("video", "video_url", "input_video")
_MAX_DEPTH = 100


def check_messages(
    messages: Sequence[Mapping[str, Any]], *, system_prompt: str | None = None
) -> list[dict[str, Any]]:
    """The messages as plain dicts with known roles, part types and parsed tool arguments.

    Raises InputError, naming the message and the field, for anything a template would drop
    silently or trip over.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError("messages must be a list of {'role': ..., 'content': ...} objects.")
    if not messages:
        raise InputError("messages is empty; give at least one message.")
    checked = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _match_tool_results(checked)
    if system_prompt:
        if checked[0]["role"] == "system":
            raise InputError(
                "Both a system prompt and a system message are given; keep one of the two."
            )
        checked.insert(0, {"role": "system", "content": system_prompt})
    return checked


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Tool declarations `{"type": "function", "function": {"name", ...}}` as plain dicts."""
    if tools is None:
        return []
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise InputError("tools must be a list of function declarations.")
    checked = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise InputError(f"tools[{i}] must be {{'type': 'function', 'function': {{...}}}}.")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise InputError(f"tools[{i}].function.name must be a non-empty string.")
        parameters = function.get("parameters") or {}
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else 0
        if not isinstance(properties, Mapping | None):
            raise InputError(f"tools[{i}].function.parameters must be a JSON schema object.")
        checked.append(_plain(tool, f"tools[{i}]"))
    return checked


def declared(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Tool declarations as a template reads them: checked, their schemas in its small language."""
    checked = check_tools(tools)
    for tool in checked:
        function = tool["function"]
        if function.get("parameters"):
            function["parameters"] = plain_parameters(function["parameters"])
    return checked


def merge_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An assistant's messages in a row as one: a template opens the model's turn once.

    A message that follows an unanswered call stays apart.
    """
    merged: list[dict[str, Any]] = []
    for message in messages:
        before = merged[-1] if merged else None
        if (
            before is None
            or not before["role"] == message["role"] == "assistant"
            or before.get("tool_calls")
        ):
            merged.append(message)
            continue
        merged[-1] = {
            **before,
            **message,
            "content": _joined([*_parts(before["content"]), *_parts(message["content"])]),
        }
    return merged


def strip_thinking(text: str) -> str:
    """`text` without `<|channel>...<channel|>` spans, as Gemma's template cuts them."""
    return "".join(part.split("<|channel>")[0] for part in text.split("<channel|>"))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} must be an object with a role and a content.")
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}.")
    # A developer message is a system message; further down the template knows only the latter.
    role = "system" if role == "developer" else role
    checked: dict[str, Any] = {"role": role, "content": _content(message, role, where)}
    for key in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        value = message.get(key)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}.{key} must be a string.")
        if value is not None:
            checked[key] = value
    if message.get("tool_calls"):
        if role != "assistant":
            raise InputError(f"{where}.tool_calls: only an assistant message can call tools.")
        checked["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return checked


def _content(message: Mapping[str, Any], role: str, where: str) -> str | list[dict[str, Any]]:
    content = message.get("content")
    if content is None and role in ("assistant", "tool"):
        return ""
    clean = strip_thinking if role == "assistant" else str
    if isinstance(content, str):
        return clean(content)
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return _joined(
            [_part(part, role, f"{where}.content[{i}]", clean) for i, part in enumerate(content)]
        )
    raise InputError(f"{where}.content must be a string or a list of parts.")


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Neighbouring texts as one, on lines of their own, where a template would glue them."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text" or not joined or joined[-1]["type"] != "text":
            joined.append(part)
            continue
        before, after = joined[-1]["text"], part["text"]
        blank = not before or not after or before[-1].isspace() or after[0].isspace()
        joined[-1] = {"type": "text", "text": f"{before}{'' if blank else chr(10)}{after}"}
    if all(part["type"] == "text" for part in joined):
        return joined[0]["text"] if joined else ""
    return joined


def _part(part: Any, role: str, where: str, clean: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in TEXT_PARTS or kind == "refusal":
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise InputError(f"{where}.text must be a string.")
        return {"type": "text", "text": clean(text)}
    if kind in IMAGE_PARTS + VIDEO_PARTS:
        if role not in ("user", "tool"):
            raise InputError(f"{where}: a message of role {role} cannot hold an image or a video.")
        return {"type": "image" if kind in IMAGE_PARTS else "video"}
    if isinstance(kind, str) and "audio" in kind:
        raise InputError(f"{where}: DiffusionGemma does not hear; audio parts are not supported.")
    raise InputError(
        f"{where}.type is {kind!r}; it must be text, image_url (or image, input_image) or video."
    )


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise InputError(f"{where} must be a list.")
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise InputError(f"{where}[{i}].function.name must be a non-empty string.")
        arguments = _arguments(function.get("arguments"), f"{where}[{i}].function.arguments")
        plain: dict[str, Any] = {"function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            plain["id"] = str(call["id"])
        checked.append(plain)
    return checked


def _arguments(arguments: Any, where: str) -> dict[str, Any] | str:
    """OpenAI sends arguments as a JSON string; a template copies one that is no JSON object."""
    text: str | None = arguments if isinstance(arguments, str) else None
    value = arguments
    if text is not None:
        try:
            value = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            return text
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        if text is not None:
            return text
        raise InputError(f"{where} must be a JSON object.")
    plain: dict[str, Any] = _plain(value, where)
    return plain


def _match_tool_results(messages: list[dict[str, Any]]) -> None:
    """Every tool result must follow the call it answers; templates drop strays without a word."""
    calls: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        if message["role"] != "tool":
            calls = message.get("tool_calls", [])
            continue
        if not calls:
            raise InputError(f"messages[{i}] is a tool result, but no tool call comes before it.")
        answered = {call["id"] for call in calls if "id" in call}
        if message.get("tool_call_id") not in answered and "name" not in message:
            raise InputError(
                f"messages[{i}].tool_call_id is {message.get('tool_call_id')!r}, "
                "which no tool call before it has."
            )


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """JSON values only: a template must not get hold of a caller's objects."""
    if depth > _MAX_DEPTH:
        raise InputError(f"{where} is nested more than {_MAX_DEPTH} levels deep.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, where, depth + 1) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(inner, where, depth + 1) for inner in value]
    raise InputError(f"{where} holds a {type(value).__name__}, which is not a JSON value.")
