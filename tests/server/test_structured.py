"""Replies around holes: what a schema pins, what is checked, retried and reported; `suffix`."""

import json
import time
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
        ({"pattern": "^[A-C]{2}-\\d+$"}, "AD-1", "does not match"),
        ({"uniqueItems": True}, [1, 1], "non-unique"),
        ({"multipleOf": 0.5}, 0.7, "not a multiple of 0.5"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, 2, "less than the minimum"),
        ({"prefixItems": [{"const": 1}], "items": False}, [1, 2], "at most 1 item"),
        (
            {"additionalProperties": {"type": "integer"}},
            {"a": "b"},
            "$.a: 'b' is not of type 'integer'",
        ),
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
        ('"Ada"', "3", "$.name: 3 is not of type 'string'"),
        ('"Ada"', '""', "$.name: '' should be non-empty"),
        ('"Ada"', '"Ada Lovelace"', "$.name: 'Ada Lovelace' is too long"),
        ("36", "36.5", "$.age: 36.5 is not of type 'integer'"),
        ("36", "true", "$.age: True is not of type 'integer'"),
        ("36", "-1", "$.age: -1 is less than the minimum"),
        ("36", "150", "$.age: 150 is greater than or equal to the maximum"),
        ('"cat"', '"cow"', "$.kind: 'cow' is not one of"),
        ("null", "4", "$.home.city: 4 is not of type 'string', 'null'"),
        ('["a"]', "[1]", "$.tags[0]: 1 is not of type 'string'"),
        ('["a"]', '["a", "b", "c"]', "$.tags: ['a', 'b', 'c'] is too long"),
        ('"v": 1', '"v": true', "$.v: 1 was expected"),
        (', "v": 1', "", "$: 'v' is a required property"),
        ('"v": 1', '"v": 1, "w": 2', "$: 'w' is not among its properties"),
    ],
)
def test_wrong_replies_are_found(old: str, new: str, says: str) -> None:
    assert says in (schema(PERSON).problem(GOOD.replace(old, new, 1)) or "")


def test_any_of_and_one_of() -> None:
    both = [{"type": "integer"}, {"type": "number", "minimum": 5}]
    choice = schema({"type": "object", "properties": {"a": {"anyOf": both}, "b": {"oneOf": both}}})
    assert shape(choice.parts) == '{"a": _, "b": _}'
    assert choice.problem('{"a": 7, "b": 1}') is None
    assert "$.b: 7 is valid under each of" in (choice.problem('{"a": 7, "b": 7}') or "")
    assert "$.a: 'x' is not" in (choice.problem('{"a": "x", "b": 1}') or "")


@pytest.mark.parametrize(
    "value",
    [
        3, {"type": "tree"}, {"$ref": "#/x"}, {"$ref": "other.json"}, {"$ref": "https://a.b/c"},
        {"$ref": "#"}, {"type": "object", "properties": 3}, {"minLength": "2"}, {"anyOf": []},
        {"multipleOf": 0}, {"pattern": 3}, {"type": "object", "required": "a"},
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
    ],
)  # fmt: skip
def test_what_is_no_schema_is_refused(value: Any) -> None:
    with pytest.raises(ApiError, match="is no JSON schema to answer in") as caught:
        schema(value)
    assert (caught.value.status, caught.value.param) == (400, "response_format")


def test_references_that_multiply_are_refused_at_once() -> None:
    twice = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    started = time.perf_counter()
    with pytest.raises(ApiError, match="multiply"):
        schema({"$ref": "#/$defs/d0", "$defs": {**twice, "d40": {"type": "string"}}})
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|aa)+$", "(x{1000}){1000}", "^(\\w+\\s?)*!$"])
def test_a_hostile_pattern_costs_a_moment(pattern: str) -> None:
    started = time.perf_counter()
    Rules({"pattern": pattern}, "here").violation("a" * 5000 + "?")
    assert time.perf_counter() - started < 1


UUID = "123e4567-e89b-42d3-a456-426614174000"
NODE: dict[str, Any] = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/N"},
                                                               {"type": "null"}]}},
    "required": ["v", "next"],
}  # fmt: skip
PETS = {
    "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat"}},
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    "$defs": {
        kind.title(): {"type": "object", "required": ["kind"],
                       "properties": {"kind": {"const": kind, "type": "string"}}}
        for kind in ("cat", "dog")
    },
}  # fmt: skip
DEEP: Any = {"type": "string"}
for _level in range(20):
    DEEP = {"type": "object", "properties": {"x": DEEP}, "required": ["x"]}
EMAIL = (
    "^(?!\\.)(?!.*\\.\\.)([A-Za-z0-9_'+\\-\\.]*)[A-Za-z0-9_+-]"
    "@([A-Za-z0-9][A-Za-z0-9\\-]*\\.)+[A-Za-z]{2,}$"
)
DAILY: list[tuple[Any, Any, Any]] = [  # schema, a value in it, a value outside
    ({"type": "string", "format": "email", "pattern": EMAIL}, "a@b.org", "a@b"),
    ({"type": "string", "format": "uuid"}, UUID, "x"),
    ({"type": "string", "format": "date"}, "2026-02-28", "2026-02-30"),
    ({"type": "string", "format": "date-time"}, "2026-02-28T10:00:00Z", "2026-02-28"),
    ({"type": "string", "format": "ipv4"}, "10.0.0.1", "10.0.0.256"),
    ({"type": "string", "contentEncoding": "base64", "format": "base64",
      "pattern": "^$|^(?:[0-9a-zA-Z+/]{4})*(?:(?:[0-9a-zA-Z+/]{2}==)|(?:[0-9a-zA-Z+/]{3}=))?$"},
     "YWI=", "?"),
    ({"type": "string", "pattern": "^(\\p{Extended_Pictographic}|\\p{Emoji_Component})+$"},
     "\U0001f600", "a"),
    ({"type": "string", "pattern": "^ab.*"}, "abc", "xab"),
    ({"type": "string", "pattern": "^(foo|bar)$"}, "bar", "baz"),
    ({"type": "string", "pattern": "^\\S+$"}, "ab", "a b"),
    ({"type": "string", "pattern": "[0-9]"}, "a1", "a"),
    ({"type": "object", "propertyNames": {"type": "string"},
      "additionalProperties": {"type": "number"}}, {"a": 1}, {"a": "x"}),
    ({"type": "object", "patternProperties": {"^x-": {"type": "integer"}},
      "additionalProperties": False}, {"x-a": 1}, {"y": 1}),
    ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]},
     ["a", 1], [1, "a"]),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "type": "array",
      "items": [{"type": "string"}], "additionalItems": False}, ["a"], ["a", "b"]),
    ({**NODE, "$defs": {"N": NODE}}, {"v": 1, "next": {"v": 2, "next": None}}, {"v": 1, "next": 3}),
    (PETS, {"kind": "dog"}, {"kind": "cow"}),
    (DEEP, json.loads('{"x":' * 20 + '"a"' + "}" * 20), {"x": 1}),
    ({"type": "string", "x-order": 1, "example": "a", "nullable": True}, None, 1),
    ({"$ref": "#/$defs/a", "nullable": True, "$defs": {"a": {"type": "string"}}}, None, 1),
    ({"type": "number", "minimum": 1, "exclusiveMinimum": True}, 1.5, 1),
    ({"not": {"type": "string"}}, 1, "a"),
    ({"if": {"type": "string"}, "then": {"minLength": 2}}, "ab", "a"),
    ({"type": "object", "required": ["undescribed"]}, {"undescribed": 1}, {}),
    ({"type": "object", "dependencies": {"a": ["b"]}}, {"a": 1, "b": 1}, {"a": 1}),
    ({"allOf": [{"properties": {"a": {"type": "string"}}}, {"required": ["a"]}],
      "type": "object", "unevaluatedProperties": False}, {"a": "x"}, {"a": "x", "b": 1}),
    ({"const": {"a": 1}}, {"a": 1}, {"a": 2}),
    ({"type": "null"}, None, 0),
    ({"enum": [None, "a", 1]}, None, "b"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "right", "wrong"), DAILY, ids=lambda value: str(value)[:40])
def test_schemas_of_every_day_are_taken_and_judged(value: Any, right: Any, wrong: Any) -> None:
    made = schema(value)
    assert made.problem(json.dumps(right)) is None
    assert made.problem(json.dumps(wrong)) is not None
    assert all(isinstance(part, Hole) == bool(i % 2) for i, part in enumerate(made.parts))


def test_a_schema_that_leaves_nothing_open_is_answered(serve: Open, filled: Any) -> None:
    asked = filled("unused")
    body = {"messages": user(), "response_format": form({"const": {"a": 1}})}
    got = serve(Script("unused")).post("/v1/chat/completions", json=body).json()
    assert got["choices"][0]["message"]["content"] == '{"a": 1}'
    assert asked == []


def test_a_key_given_twice_is_a_problem() -> None:
    assert schema({"type": "object"}).problem('{"a": 1, "a": 2}') == "it has the key 'a' twice"


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


def test_max_tokens_cuts_a_structured_reply(serve: Open, filled: Any) -> None:
    filled(GOOD)
    body = {"messages": user(), "response_format": form(), "max_tokens": 3}
    got = serve(Script("unused")).post("/v1/chat/completions", json=body).json()
    assert got["usage"]["completion_tokens"] == 3
    assert got["choices"][0]["finish_reason"] == "length"
    assert GOOD.startswith(got["choices"][0]["message"]["content"])


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ANY = {"type": "object"}


@pytest.mark.parametrize(
    ("reply", "called", "answer"),
    [
        ("<|tool_call>call:look{}<tool_call|>", "look", None),
        (GOOD, None, GOOD),
        ("Some words.", None, '{"filled": 1}'),
    ],
)
def test_with_tools_the_model_may_call_or_answer_in_the_schema(
    serve: Open, filled: Any, reply: str, called: str | None, answer: str | None
) -> None:
    filled('{"filled": 1}')
    client = serve(Script(reply))
    shared = {"messages": user(), "tools": [TOOL], "response_format": form(ANY)}
    message = client.post("/v1/chat/completions", json=shared).json()["choices"][0]["message"]
    names = [call["function"]["name"] for call in message.get("tool_calls", [])]
    assert (names, message["content"]) == ([called] if called else [], answer)


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_anthropic_takes_a_format_in_both_spellings(serve: Open, filled: Any, field: str) -> None:
    filled(GOOD)
    asked = {"type": "json_schema", "schema": PERSON}
    given = {"output_config": {"format": asked, "effort": "low"}, "output_format": asked}[field]
    body = {"messages": user(), "max_tokens": 200, field: given}
    got = serve(Script("unused")).post("/v1/messages", json=body).json()
    assert got["content"] == [{"type": "text", "text": GOOD}]
    assert got["x_warnings"] == []


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
