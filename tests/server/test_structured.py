"""Replies around holes: what a schema pins, what is checked, retried and reported; `suffix`."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_dgemma.infilling import Filling, Infill
from mlx_dgemma.prompt.holes import Hole
from mlx_dgemma.server import engine as engine_module
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.schema import Schema
from mlx_dgemma.server.validation import Rules

from .conftest import Open, Script, user

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "nick": {"type": "string"},
        "home": {"$ref": "#/$defs/home"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        "v": {"const": 1},
    },
    "required": ["name", "age", "kind", "home", "tags", "v"],
    "additionalProperties": False,
    "$defs": {"home": {"type": "object", "properties": {"city": {"type": ["string", "null"]}}}},
}
GOOD = '{"name": "Ada", "age": 36, "kind": "cat", "home": {"city": null}, "tags": ["a"], "v": 1}'


def schema(value: Any) -> Schema:
    return Schema(value, "response_format")


def shape(parts: list[str | Hole]) -> str:
    """The text with each hole as _, or as its choices, or as its alphabet."""
    assert all(isinstance(part, Hole) == bool(i % 2) for i, part in enumerate(parts))
    return "".join(
        part if isinstance(part, str) else f"({'|'.join(part.choices)})" if part.choices
        else f"<{part.alphabet}>" if part.alphabet else "_"
        for part in parts
    )  # fmt: skip


def test_the_fixed_part_is_pinned() -> None:
    assert shape(schema(PERSON).parts) == (
        '{"name": "_", "age": <[-\\d]+>, "kind": "(cat|dog)", '
        '"home": {"city": _}, "tags": [_], "v": 1}'
    )
    assert shape(schema({"type": "object"}).parts) == "{_}"
    assert shape(schema({"type": "array", "items": {"type": "number"}}).parts) == "[_]"


@pytest.mark.parametrize(
    ("value", "pinned"),
    [
        ({"enum": [1, "a", None]}, '(1|"a"|null)'),
        ({"type": "boolean"}, "(true|false)"),
        ({"anyOf": [{"const": "x"}, {"enum": ["y", "z"]}]}, '"(x|y|z)"'),
        ({"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
         '["_", "_"]'),
        ({"type": "array", "prefixItems": [{"const": 1}, {"type": "string"}], "items": False},
         '[1, "_"]'),
        ({"type": "string", "pattern": "^[A-C]{2}-\\d+$"},
         """"<(?:(?!["\\\\\\x00-\\x1f])[A-C])>-<(?:(?!["\\\\\\x00-\\x1f])\\d)+>\""""),
        ({"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}},
                    {"properties": {"a": {"const": "x"}, "b": True}, "required": ["b", "a"]}]},
         '{"a": "x", "b": _}'),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "{_}"),
        ({"type": ["string"]}, '"_"'),
    ],
)  # fmt: skip
def test_what_each_keyword_pins(value: Any, pinned: str) -> None:
    assert shape(schema({"type": "array", "prefixItems": [value], "items": False}).parts) == (
        f"[{pinned}]"
    )


def test_a_name_that_spells_a_hole_is_a_name() -> None:
    spelled = schema({"type": "object", "properties": {"a<hole>b\\": {"type": "string"}}})
    assert shape(spelled.parts) == '{"a<hole>b\\\\": "_"}'


@pytest.mark.parametrize(
    ("value", "wrong", "says"),
    [
        ({"pattern": "^[A-C]{2}-\\d+$"}, "AD-1", "does not match its pattern"),
        ({"uniqueItems": True}, [1, 1], "repeats an item"),
        ({"multipleOf": 0.5}, 0.7, "is no multiple of 0.5"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, 2, "out of bounds"),
        ({"prefixItems": [{"const": 1}], "items": False}, [1, 2], "has 2 items"),
        ({"additionalProperties": {"type": "integer"}}, {"a": "b"}, "$.a is not of type integer"),
    ],
)
def test_rules_find_what_breaks_them(value: Any, wrong: Any, says: str) -> None:
    assert says in (Rules(value, "here").violation(wrong) or "")


def test_a_right_reply_passes() -> None:
    assert schema(PERSON).problem(GOOD) is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"Ada"', '"Ada', "not valid JSON"),
        ('"Ada"', "3", "$.name is not of type string"),
        ('"Ada"', '""', "$.name has 0 characters"),
        ('"Ada"', '"Ada Lovelace"', "$.name has 12 characters"),
        ("36", "36.5", "$.age is not of type integer"),
        ("36", "true", "$.age is not of type integer"),
        ("36", "-1", "$.age is out of bounds"),
        ("36", "150", "$.age is out of bounds"),
        ('"cat"', '"cow"', "$.kind is none of the enum's values"),
        ("null", "4", "$.home.city is not of type string or null"),
        ('["a"]', "[1]", "$.tags[0] is not of type string"),
        ('["a"]', '["a", "b", "c"]', "$.tags has 3 items"),
        ('"v": 1', '"v": true', "$.v is not the constant"),
        (', "v": 1', "", "$ has no 'v'"),
        ('"v": 1', '"v": 1, "w": 2', "$ has an additional 'w'"),
    ],
)
def test_wrong_replies_are_found(old: str, new: str, says: str) -> None:
    assert says in (schema(PERSON).problem(GOOD.replace(old, new, 1)) or "")


def test_any_of_and_one_of() -> None:
    both = [{"type": "integer"}, {"type": "number", "minimum": 5}]
    choice = schema({"type": "object", "properties": {"a": {"anyOf": both}, "b": {"oneOf": both}}})
    assert shape(choice.parts) == '{"a": _, "b": _}'
    assert choice.problem('{"a": 7, "b": 1}') is None
    assert "$.b fits 2" in (choice.problem('{"a": 7, "b": 7}') or "")
    assert "$.a fits 0" in (choice.problem('{"a": "x", "b": 1}') or "")


@pytest.mark.parametrize(
    "value",
    [
        3, {"type": "tree"}, {"pattern": "a"}, {"pattern": "^(a+)+$"}, {"pattern": "^a*$"},
        {"pattern": "^\\d+\\d+\\d+\\d+\\d+$"}, {"pattern": "^[[a]$"}, {"pattern": 3},
        {"pattern": "^a[bc]{33}$"},
        {"const": 1}, {"type": "null"}, {"$ref": "#/x"},
        {"$ref": "other.json"}, {"$ref": "#"}, {"enum": []}, {"type": "object", "properties": 3},
        {"type": "object", "required": ["a"]}, {"minLength": "2"}, {"anyOf": []},
        {"allOf": [{"type": "string"}, {"type": "array"}]}, {"multipleOf": 0}, {"not": {}},
        {"allOf": [{"additionalProperties": False}, {"properties": {"a": True}}]},
        {"anyOf": [{"pattern": "a"}]}, {"type": "object", "required": "a"},
        {"type": "array", "items": {"format": "x", "allOf": []}},
    ],
)  # fmt: skip
def test_schemas_it_cannot_pin_are_refused(value: Any) -> None:
    with pytest.raises(ApiError, match="cannot pin it") as caught:
        schema(value)
    assert (caught.value.status, caught.value.param) == (400, "response_format")


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Scripts what infilling gives; returns the list of (text, options) it was asked."""

    def script(*texts: str) -> list[tuple[str, Any]]:
        asked: list[tuple[str, Any]] = []

        def infill_turns(_m: Any, _t: Any, parts: Any, **options: Any) -> Iterator[Any]:
            asked.append((shape(parts), options))
            given = texts[min(len(asked), len(texts)) - 1]
            yield 5
            yield Infill(given, (Filling(given, (0, len(given)), 1, ()),), 0.0, 0, 3, True, 5)

        monkeypatch.setattr(engine_module, "infill_turns", infill_turns)
        return asked

    return script


def form(value: Any = PERSON) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": value}}


def test_chat_retries_with_new_seeds_until_it_fits(serve: Open, filled: Any) -> None:
    asked = filled("{", "{}", GOOD)
    body = {"messages": user(), "response_format": form(), "seed": 5, "temperature": 0}
    got = serve(Script("unused")).post("/v1/chat/completions", json=body).json()
    choice = got["choices"][0]
    assert choice["message"]["content"] == GOOD
    assert (choice["finish_reason"], choice["x_diffusion"]["blocks"]) == ("stop", 3)
    assert got["x_warnings"] == []
    assert len({options["seed"] for _, options in asked}) == 3
    assert asked[0][1]["seed"] == 5
    assert asked[0][1]["temp"] == 0
    assert asked[0][0] == shape(schema(PERSON).parts)


def test_a_reply_that_never_fits_is_reported(serve: Open, filled: Any) -> None:
    asked = filled('{"name": 3}')
    body = {"messages": user(), "response_format": form()}
    got = serve(Script("unused")).post("/v1/chat/completions", json=body).json()
    assert len(asked) == 4
    assert got["choices"][0]["message"]["content"] == '{"name": 3}'
    assert "after 4 attempts" in got["x_warnings"][0]


def test_streams_and_responses_take_formats_too(serve: Open, filled: Any) -> None:
    filled(GOOD)
    client = serve(Script("unused"))
    body = {"messages": user(), "response_format": {"type": "json_object"}, "stream": True}
    text = client.post("/v1/chat/completions", json=body).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    deltas = [c["delta"].get("content", "") for k in chunks for c in k["choices"]]
    assert "".join(deltas) == GOOD
    asked = {"input": "hi", "text": {"format": {**form()["json_schema"], "type": "json_schema"}}}
    got = client.post("/v1/responses", json=asked).json()
    assert got["output"][0]["content"][0]["text"] == GOOD


def test_suffix_fills_between_both_sides(serve: Open, filled: Any) -> None:
    asked = filled("middle")
    body = {"prompt": "left <hole> ", "suffix": " right"}
    got = serve(Script("unused")).post("/v1/completions", json=body).json()
    assert got["choices"][0]["text"] == "middle"
    assert asked[0][0] == "left <hole> _ right"
