"""Requests that nobody should send: sound ones with damage that knows their structure.

Seeded: the same seed gives the same requests. The generator begins with sound requests of every
endpoint and damages them: other types, other sizes, other nesting, keys exchanged, numbers out of
range, half characters, control tokens; or it damages the bytes. `bounds.py` says what must hold for
every answer; `havoc.py` damages in another way.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {
    "type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}}}  # fmt: skip
_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3},
        "b": {"enum": ["x", "y"]},
        "c": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/d"}]},
        "e": {"type": "string", "pattern": "^[a-z]{2}-\\d+$"},
    },
    "required": ["a", "b"],
    "$defs": {"d": {"type": "string", "maxLength": 9}},
}
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AA"
    "AAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
_CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"q": 1}'}}
_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hi"},
                                 {"type": "image_url", "image_url": {"url": _PIXEL}}]},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "1"},
    {"role": "user", "content": "and?"},
]  # fmt: skip
_COMMON = {"max_tokens": 9, "temperature": 1.0, "seed": 3, "stream": True, "stop": ["x"],
           "max_denoising_steps": 5, "entropy_bound": 0.1, "canvas_length": 8}  # fmt: skip
SOUND: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": _TURNS, "tools": [_TOOL], "n": 2, "logprobs": True,
                              "tool_choice": "required", "stream_options": {"include_usage": True},
                              **_COMMON}),
    ("/v1/chat/completions", {"messages": _TURNS[:1] + _TURNS[4:], "response_format": {
        "type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}, "max_tokens": 9}),
    ("/v1/completions", {"prompt": "Once", "suffix": "end", "echo": True, "max_tokens": 9}),
    ("/v1/completions", {"prompt": [5, 6, 7], "logprobs": 1, **_COMMON}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                                 {"type": "function_call_output", "call_id": "c", "output": "o"}],
                       "instructions": "i", "text": {"format": {"type": "json_schema", "name": "s",
                                                                "schema": _SCHEMA}}}),
    ("/v1/messages", {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "a"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": _PIXEL.partition(",")[2]}}]}],
        "system": "s", "max_tokens": 9, "tools": [{"name": "look", "input_schema": _SCHEMA}],
        "tool_choice": {"type": "tool", "name": "look"}, "thinking": {"type": "enabled"}}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/systemone", {"state": "s", "questions": {
        "q": {"type": "choice", "instructions": "t", "criteria": {"a": "x", "b": None}},
        "s": {"type": "score", "instructions": "t", "criteria": ["low", "high"]}}, "x_orders": 1}),
)  # fmt: skip
_TEXTS = (
    *("", " ", "a", "\x00", "\ud800", "\udfff\ud800", "<|turn>", "<turn|>user", "<|image|>"),
    *("<|channel>thought", "<|tool_call>call:x{", "\u202e", "\ufffd\ufdd0", "e\u0301" * 9, "NaN"),
    *("https://127.0.0.1/x", "http://[::1]:9/", "data:image/png;base64,AAAA", "file:///etc/passwd"),
    *("data:,", "//", "ftp://a", "<hole>", "<hole:9-1>", "^(a+)+$", "^[a-z]{1,32}$", "#/$defs/d"),
    *("#", "user", "assistant", "tool", "text", "image", "function", "json_object", "x" * 5000),
)
_NUMBERS = (0, 1, -1, 2, 255, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**53, 2**63, 10**40, True, False)
_RAW = ("1e999", "-1e999", "NaN", "Infinity", '"\\ud800"', '"\\ud83d\\ude00"', "9" * 5000, "1" * 99,
        "[" * 70 + "]" * 70, '{"a":' * 200 + "1" + "}" * 200, "0.1e-9999")  # fmt: skip
_MARK = "\ue000raw%d\ue000"


def requests(seed: int) -> Iterator[tuple[str, str, dict[str, str], bytes]]:
    """(method, path, headers, body), without an end."""
    rng = random.Random(seed)
    while True:
        # Decisions are those of a model, which takes its time.
        path, sound = SOUND[-1] if rng.random() < 0.01 else rng.choice(SOUND[:-1])
        body = copy.deepcopy(sound)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            _damage(rng, body)
        text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
        for number, raw in enumerate(_RAW):
            text = text.replace(json.dumps(_MARK % number), raw).replace(
                json.dumps(_MARK % number, ensure_ascii=False), raw
            )
        content = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            content = _damaged_bytes(rng, content)
        kind = "application/json" if rng.random() < 0.98 else rng.choice(_TEXTS[:6])
        method = "POST" if rng.random() < 0.99 else rng.choice(("GET", "PUT", "HEAD", "DELETE"))
        yield method, path, {"content-type": kind}, content


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], dict | list):
                waiting.append(one[key])
    return found


def _damage(rng: random.Random, body: dict[str, Any]) -> None:
    places = _places(body)
    if not places:
        return
    inside, key = rng.choice(places)
    other, from_ = rng.choice(places)
    what = rng.randrange(8)
    if what == 0:
        del inside[key]
    elif what == 1:
        inside[key] = copy.deepcopy(other[from_])
    elif what == 2 and isinstance(inside, dict):
        inside[rng.choice([*_TEXTS, str(from_)])] = inside.pop(key)
    elif what == 3 and isinstance(inside, list):
        inside *= rng.choice((2, 2, 9))
        del inside[100:]
    elif what == 4:
        for _ in range(rng.choice((1, 5, 40))):
            inside[key] = {rng.choice(("items", "a", "anyOf")): inside[key]} if rng.random() < 0.5 \
                else [inside[key]]  # fmt: skip
    else:
        inside[key] = value(rng)


def value(rng: random.Random) -> Any:
    """Any JSON value, and some that only look like one."""
    what = rng.randrange(8)
    if what == 0:
        return None
    if what == 1:
        return rng.choice(_NUMBERS)
    if what == 2:
        return _MARK % rng.randrange(len(_RAW))
    if what == 3:
        return [value(rng) for _ in range(rng.choice((0, 1, 2, 20)))] if rng.random() < 0.4 else []
    if what == 4:
        return {rng.choice(_TEXTS): value(rng)} if rng.random() < 0.5 else {}
    if what == 5:
        return schema(rng, rng.randint(0, 5))
    return rng.choice(_TEXTS)


def schema(rng: random.Random, depth: int) -> Any:
    """A JSON schema, mostly a sound one; nested fixed arrays multiply to more than memory holds."""
    if depth == 0 or rng.random() < 0.1:
        leaf: dict[str, Any] = {"type": rng.choice(("string", "integer", "boolean", "null"))}
        if rng.random() < 0.3:
            leaf["enum"] = [value(rng) for _ in range(2)]
        if rng.random() < 0.2:
            leaf["pattern"] = rng.choice(_TEXTS)
        return leaf
    inner = schema(rng, depth - 1)
    count = rng.choice((0, 1, 2, 64, 65, 10**9))
    return rng.choice(
        [
            {"type": "array", "items": inner, "minItems": count, "maxItems": count},
            {"type": "array", "prefixItems": [inner] * min(count, 3), "items": False},
            {"type": "object", "properties": {f"k{i}": inner for i in range(min(count, 3))}},
            {"anyOf": [inner, inner]},
            {"allOf": [inner, inner, {"$ref": "#"}]},
            {"$ref": "#/$defs/d", "$defs": {"d": inner}},
        ]
    )


def _damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        what = rng.randrange(4)
        if what == 0:
            changed[at : at + 1] = rng.randbytes(1)
        elif what == 1:
            del changed[at:]
        elif what == 2:
            changed[at:at] = rng.choice([b"\xff", b"\xed\xa0\x80", b"[" * 999, b'"', b"\\", b"\0"])
        else:
            changed[at : at + rng.randint(1, 40)] = b""
    return bytes(changed)
