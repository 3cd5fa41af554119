"""Repairs a conversation as agents send it, so that one odd message does not end it.

What cannot be read becomes a readable placeholder or goes, each with a warning; tool results are
paired with their calls by id, wherever they stand. Sound and video are refused in the newest
question only, and so is what is malformed: elsewhere nobody could take them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_dgemma.prompt.messages import IMAGE_PARTS, TEXT_PARTS, VIDEO_PARTS

_THOUGHT_PARTS = ("thinking", "reasoning", "redacted_thinking")
Message = dict[str, Any]


def repair(messages: list[Any]) -> tuple[list[Any], tuple[str, ...]]:
    """The messages in an order and a form that templates take, and warnings.

    What is no message at all is left for the encoder to refuse.
    """
    warnings: list[str] = []
    groups: list[list[Any]] = []  # a message, and after an assistant's calls their results
    newest = newest_question(messages)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            groups.append([message])
            continue
        repaired = _message(message, f"messages[{i}]", warnings, newest=i == newest)
        if repaired.get("role") != "tool":
            groups.append([repaired])
            continue
        group = _asked_in(groups, repaired)
        if group is not None:
            group.append(repaired)
            continue
        warnings.append(f"messages[{i}] answers a tool call that is not in the conversation")
        called = repaired.get("name") or "a tool call"
        text = f"The result of {called}: {_text(repaired['content'])}"
        groups.append([{"role": "user", "content": text}])
    for group in groups[:-1]:
        missing = _unanswered(group)
        if missing:
            warnings.append(f"tool calls without a result: {len(missing)}")
            group += [{**result, "content": "(no result)"} for result in missing]
    for group in groups:
        group[1:] = _in_order(group)
    return [message for group in groups for message in group], tuple(dict.fromkeys(warnings))


def newest_question(messages: list[Any]) -> int:
    """The index of the last message of the user; -1 where there is none."""
    asked = [
        i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "user"
    ]
    return asked[-1] if asked else -1


def _message(
    message: Mapping[str, Any], where: str, warnings: list[str], *, newest: bool
) -> Message:
    repaired = dict(message)
    if repaired.get("role") == "function":  # the name of the role before there were tools
        repaired["role"] = "tool"
    role, content = repaired.get("role"), repaired.get("content")
    if isinstance(content, list):
        repaired["content"] = _parts(content, repaired, where, warnings, newest)
    elif content is None and role in ("system", "developer", "user", "tool"):
        repaired["content"] = ""
        if role != "tool":
            warnings.append(f"{where}.content is null and was read as empty")
    elif role in ("tool", "assistant") and not isinstance(content, str | None):
        repaired["content"] = json.dumps(content, ensure_ascii=False)
    if role == "assistant":
        _read_calls(repaired, where, warnings)
    for name in ("name", "tool_call_id"):
        if name in repaired and not isinstance(repaired[name], str | None):
            repaired[name] = str(repaired[name])
    for name in ("reasoning", "reasoning_content"):
        if not isinstance(repaired.get(name), str | None):
            warnings.append(f"{where}.{name} is no text and was left out")
            del repaired[name]
    return repaired


def _parts(
    parts: list[Any], message: Message, where: str, warnings: list[str], newest: bool
) -> list[Any]:
    """Parts the encoder reads, and placeholders for the others."""
    read: list[Any] = []
    for j, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            read.append({"type": "text", "text": part})
        elif kind in _THOUGHT_PARTS:
            continue
        elif kind in IMAGE_PARTS and message.get("role") not in ("user", "tool"):
            warnings.append(f"{where}.content[{j}] is an image of a {message.get('role')} message")
            read.append({"type": "text", "text": "[an image was left out]"})
        elif kind in (*TEXT_PARTS, "refusal"):
            name = "refusal" if kind == "refusal" else "text"
            if not isinstance(part.get(name), str) and not (newest and part.get(name)):
                warnings.append(f"{where}.content[{j}].{name} is no text")
                part = {**part, name: _written(part.get(name))}
            read.append(part)
        elif kind in IMAGE_PARTS:
            read.append(part)
        elif not isinstance(kind, str):
            if not newest:
                warnings.append(f"{where}.content[{j}] has no type and was read as text")
                part = {"type": "text", "text": _written(part)}
            read.append(part)
        elif newest and (kind in VIDEO_PARTS or "audio" in kind):
            read.append(part)  # which the encoder refuses with a sentence
        else:
            warnings.append(f"{where}.content[{j}] of type {kind} cannot be read")
            read.append(placeholder(part))
    return read


def placeholder(part: Mapping[str, Any]) -> dict[str, str]:
    """What the model reads in the place of a part that it cannot: its kind, name and text."""
    kind = str(part.get("type"))
    inner = part.get(kind)
    fields = {**part, **inner} if isinstance(inner, Mapping) else part
    names = ("filename", "title", "name", "tool_name", "url", "source")
    name = next((fields[n] for n in names if isinstance(fields.get(n), str)), "")
    text = _text(fields.get("content") or fields.get("text") or "")
    head = f"[{kind}{f' {name}' if name else ''}: this model cannot read it]"
    return {"type": "text", "text": f"{head}\n{text}" if text else head}


def _written(value: Any) -> str:
    """JSON for a value that should be text; nothing for none."""
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    listed = content if isinstance(content, list) else []
    texts = [part.get("text") for part in listed if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _read_calls(message: Message, where: str, warnings: list[str]) -> None:
    """The calls of an assistant's message, in place, each a function's with a name."""
    older = message.pop("function_call", None)  # the only call, before there were tools
    calls = message.get("tool_calls") or ([{"function": older}] if older else [])
    message.pop("tool_calls", None)
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function") or call.get("custom") if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping):
            warnings.append(f"{where}.tool_calls has a call without a function, which was left out")
            continue
        name, arguments = inner.get("name"), inner.get("arguments")
        if call.get("custom") is inner:
            arguments = {"input": inner.get("input") or ""}
        elif not isinstance(arguments, str | Mapping | None):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(name, str) or not name:
            warnings.append(f"{where}.tool_calls has a call without a name")
            name = "unnamed"
        one: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            one["id"] = str(call["id"])
        read.append(one)
    if read:
        message["tool_calls"] = read


def _asked_in(groups: list[list[Any]], result: Message) -> list[Any] | None:
    """The group whose calls the result answers; it gets the id or name that pairs them."""
    for group in groups[::-1]:
        calls = _calls(group)
        identity = result.get("tool_call_id")
        if identity and identity in [call.get("id") for call in calls]:
            return group
        if calls and not identity:
            open_calls = _unanswered(group)
            named = [call for call in open_calls if call.get("name") == result.get("name")]
            if named or open_calls:
                result.update((named or open_calls)[0])
                return group
    return None


def _unanswered(group: list[Any]) -> list[Message]:
    """Ids and names of the group's calls that have no result yet."""
    calls = _calls(group)
    ids = [m.get("tool_call_id") for m in group[1:]]
    names = [m.get("name") for m in group[1:] if not m.get("tool_call_id")]
    missing = []
    for call in calls:
        function = call.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        identity = call.get("id")
        if identity in ids if identity else name in names:
            if not identity:
                names.remove(name)  # one result answers one call
            continue
        missing.append(
            {"role": "tool", "name": name} | ({"tool_call_id": identity} if identity else {})
        )
    return missing


def _in_order(group: list[Any]) -> list[Any]:
    """The results in the order of their calls: a template names each by its tool alone."""
    order = [call.get("id") for call in _calls(group)]

    def place(result: Message) -> int:
        identity = result.get("tool_call_id")
        return order.index(identity) if identity and identity in order else len(order)

    return sorted(group[1:], key=place)


def _calls(group: list[Any]) -> list[Mapping[str, Any]]:
    first = group[0]
    calls = first.get("tool_calls") if isinstance(first, Mapping) else None
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
