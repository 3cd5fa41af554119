"""Replies held to a format: in it by construction, refused, or checked and reported; `suffix`."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from mlx_dgemma import Constraint, Runtime
from mlx_dgemma.infilling import Filling, Infill
from mlx_dgemma.prompt.holes import Hole
from mlx_dgemma.server import engine as engine_module
from mlx_dgemma.server import validation
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.keyword_shapes import well_formed
from mlx_dgemma.server.settings import ServerSettings
from mlx_dgemma.server.structured import Wanted, _breach
from mlx_dgemma.server.validation import Rules, UnjudgedError

from .conftest import Open, Script, tokenizer, user

CHAT = "/v1/chat/completions"

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


def schema(value: Any) -> Wanted:
    return Wanted.schema(value, "response_format")


def problem(wanted: Wanted, text: str) -> str | None:
    assert wanted.rules is not None
    return wanted.rules.violation(json.loads(text))


@pytest.mark.parametrize(
    ("value", "wrong", "says"),
    [
        ({"pattern": "^[A-C]{2}-\\d+$"}, "AD-1", "does not match"),
        ({"uniqueItems": True}, [1, 1], "non-unique"),
        ({"multipleOf": 0.5}, 0.7, "not a multiple of 0.5"),
        ({"multipleOf": 0.1, "maximum": 0.6}, 0.7, "greater than the maximum"),
        ({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"const": 1}}}, 2, "1 was expected"),
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
    assert problem(schema(PERSON), GOOD) is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
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
    assert says in (problem(schema(PERSON), GOOD.replace(old, new, 1)) or "")


def test_any_of_and_one_of() -> None:
    both = [{"type": "integer"}, {"type": "number", "minimum": 5}]
    choice = schema({"type": "object", "properties": {"a": {"anyOf": both}, "b": {"oneOf": both}}})
    assert problem(choice, '{"a": 7, "b": 1}') is None
    assert "$.b: 7 is valid under each of" in (problem(choice, '{"a": 7, "b": 7}') or "")
    assert "$.a: 'x' is not" in (problem(choice, '{"a": "x", "b": 1}') or "")


@pytest.mark.parametrize(
    "value",
    [
        3, {"type": "tree"}, {"$ref": "#/x"}, {"$ref": "other.json"}, {"$ref": "https://a.b/c"},
        {"$dynamicRef": "#name"}, {"$ref": "#name", "$anchor": "name"},
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


def test_a_long_chain_of_references_is_refused_and_long_recursion_is_not() -> None:
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
    with pytest.raises(ApiError, match="in a row"):
        schema({"$ref": "#/$defs/d0", "$defs": {**chain, "d5000": {"type": "string"}}})
    through = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(2000)}
    rules = Rules({"$ref": "#/$defs/d0", "$defs": {**through, "d2000": {}}}, "here")
    assert "$.a.a" in (rules.violation({"a": {"a": 3}}) or "$.a.a")


@pytest.mark.parametrize(
    ("reference", "where"),
    [
        ("#/components/schemas/A", {"components": {"schemas": {"A": {"const": 1}}}}),
        ("#/$defs/a%20b", {"$defs": {"a b": {"const": 1}}}),
        ("#/$defs/a%20b", {"$defs": {"a%20b": {"const": 1}}}),
        ("#/$defs/a~1b", {"$defs": {"a/b": {"const": 1}}}),
        ("#/$defs/a~2b", {"$defs": {"a~2b": {"const": 1}}}),
        ("#/x/0", {"x": [{"nullable": True, "const": 1}]}),
        ("#/x", {"x": {"$ref": "#/y/z"}, "y": {"z": {"exclusiveMinimum": True, "minimum": 2}}}),
        ("#/", {"": {"const": 1}, "$defs": {"target-0": {}}}),
    ],
)
def test_references_lead_to_any_place_of_the_schema(reference: str, where: Any) -> None:
    """Whoever follows them: the check of the schema, the language and the check of the reply."""
    given = {"type": "object", "properties": {"a": {"$ref": reference}}, **where}
    before = json.dumps(given)
    wanted = Wanted.schema(given, "here")
    assert wanted.rules is not None
    assert "$.a: " in (wanted.rules.violation({"a": 2}) or "")
    language = wanted.constraint.language(tokenizer(), 2048)
    assert language.automaton.start
    assert json.dumps(given) == before


@pytest.mark.parametrize(
    "place",
    [{"properties": 3}, {"type": 5}, {"minimum": []}, {"allOf": [{"$ref": "#/x"}]}, "text", []],
)  # fmt: skip
def test_a_reference_to_what_is_no_schema_is_refused(place: Any) -> None:
    with pytest.raises(ApiError, match="is no JSON schema to answer in"):
        schema({"properties": {"a": {"$ref": "#/x"}}, "x": place})


METASCHEMA = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
KEYWORD_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        1.0,
        1.5,
        -2.5,
        "a",
        "",
        "string",
        "#/a",
        "1a",
        {},
        [],
        [{}],
        [3],
    ),
    *([True], ["a"], ["a", "a"], ["string", "null"], ["string", "x"], {"a": {}}, {"a": 3}, [[]]),
    *({"a": True}, {"a": ["b"]}, {"a": ["b", "b"]}, {"a": [1]}, {"a": None}, [None], ["a", 1]),
]


def test_the_quick_check_of_keywords_says_what_the_metaschema_says() -> None:
    names = {"$defs", "$ref", "$anchor", "$dynamicAnchor", "$comment", "$vocabulary", "unknown",
             *jsonschema.Draft202012Validator.VALIDATORS, "title", "description", "deprecated",
             "readOnly", "writeOnly", "examples", "default", "contentEncoding", "contentMediaType",
             "contentSchema",
             "minContains", "maxContains", "definitions", "then", "else"}  # fmt: skip
    for name in sorted(names):
        for value in KEYWORD_VALUES:
            given = {name: value}
            valid = METASCHEMA.is_valid(given)
            assert well_formed(given) == valid, given


def test_many_schemas_are_checked_in_a_moment() -> None:
    started = time.thread_time()
    Rules(
        {"properties": {f"k{i}": {"type": "integer", "minimum": i} for i in range(15_000)}}, "here"
    )
    assert time.thread_time() - started < 4  # the metaschema took 2.5 s, and 8 on a busy machine


def test_judging_a_value_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "JUDGE_SECONDS", 0.3)
    options = [{"properties": {"a": {"const": i}}, "required": ["a"]} for i in range(2000)]
    rules = Rules({"type": "array", "items": {"not": {"anyOf": options}}}, "here")
    started = time.thread_time()
    with pytest.raises(UnjudgedError, match=r"longer than 0\.3 s"):
        rules.violation([{"a": -1}] * 4000)
    assert time.thread_time() - started < 2
    wanted = Wanted(Constraint.json_object(), "here", rules)
    said = _breach(json.dumps([{"a": -1}] * 4000), [], wanted, {})
    assert said == "the reply was not checked against its schema: that takes longer than 0.3 s"


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|aa)+$", "(x{1000}){1000}", "^(\\w+\\s?)*!$"])
def test_a_hostile_pattern_costs_a_moment(pattern: str) -> None:
    started = time.thread_time()
    Rules({"pattern": pattern}, "here").violation("a" * 5000 + "?")
    assert time.thread_time() - started < 1


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
    assert problem(made, json.dumps(right)) is None
    assert problem(made, json.dumps(wrong)) is not None
    assert made.constraint.language(tokenizer(), 896).automaton.start > 1


def form(value: Any = PERSON) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": value}}


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Scripts what infilling gives; returns the list of (text, options) it was asked."""

    def script(*texts: str) -> list[tuple[list[str | Hole], Any]]:
        asked: list[tuple[list[str | Hole], Any]] = []

        def infill_turns(_m: Any, _t: Any, parts: Any, **options: Any) -> Iterator[Any]:
            asked.append((parts, options))
            given = texts[min(len(asked), len(texts)) - 1]
            yield 5
            yield Infill(given, (Filling(given, (0, len(given)), 1, ()),), 0.0, 0, 3, True, 5)

        monkeypatch.setattr(engine_module, "infill_turns", infill_turns)
        return asked

    return script


@pytest.fixture(scope="module")
def demo() -> Iterator[TestClient]:
    with TestClient(create_app(Runtime(), ServerSettings()), base_url="http://127.0.0.1") as client:
        yield client


ASK = user("Write JSON with name, age and pet.")


@pytest.mark.parametrize("seed", [1, 2])
def test_every_dialect_answers_in_the_schema(demo: TestClient, seed: int) -> None:
    few = {"seed": seed, "max_denoising_steps": 3}
    asked = form()["json_schema"]
    chat = demo.post(CHAT, json={"messages": ASK, "response_format": form(), **few}).json()
    flat = {"input": ASK[0]["content"], "text": {"format": {"type": "json_schema", **asked}}}
    responses = demo.post("/v1/responses", json={**flat, **few}).json()
    format_ = {"output_config": {"format": {"type": "json_schema", "schema": PERSON}}}
    body = {"messages": ASK, "max_tokens": 200, **few, **format_}
    messages = demo.post("/v1/messages", json=body).json()
    texts = [
        chat["choices"][0]["message"]["content"],
        responses["output"][0]["content"][0]["text"],
        messages["content"][0]["text"],
    ]
    assert chat["choices"][0]["finish_reason"] == "stop"
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert all("converging" in warning for warning in chat["x_warnings"])


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]+"}, "[a-c]{3}-[0-9]+"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"json": {"enum": [1, 2]}}, "1|2"),
    ],
)
def test_structured_outputs_in_vllms_spelling_with_several_choices_streamed_drafts_and_stops(
    demo: TestClient, outputs: Any, pattern: str
) -> None:
    body = {"messages": ASK, "structured_outputs": outputs, "n": 2, "seed": 1}
    body |= {"stop": ["#"], "max_denoising_steps": 3}
    got = demo.post(CHAT, json=body).json()
    assert all("converging" in warning for warning in got["x_warnings"])
    texts = [choice["message"]["content"] for choice in got["choices"]]
    assert len(texts) == 2
    assert all(re.fullmatch(pattern, text) for text in texts)
    body |= {"n": 1, "stream": True, "stream_options": {"include_drafts": True}}
    lines = demo.post(CHAT, json=body).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [c["delta"].get("content", "") for k in chunks for c in k.get("choices", [])]
    assert "".join(deltas) == texts[0]


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ({"regex": "(a"}, "without a ')'"),
        ({"regex": "a(?<=b)"}, "looks behind"),
        ({"regex": "a{30000}"}, "more than 10000"),
        ({"regex": "(" * 200 + "a" + ")" * 200}, "nests more than"),
        ({"regex": "((a{9000}){9000}){9000}"}, "the most"),
        ({"choice": [str(n) for n in range(10_000)]}, "at most 5000"),
        ({"choice": []}, "at least one"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "No text"),
        ({"json": {"type": "string", "minLength": 200000}}, "bytes"),
        ({"regex": "a", "choice": ["b"]}, "one of regex, choice and json"),
    ],
)
def test_what_cannot_be_followed_is_refused_within_a_second(
    serve: Open, outputs: Any, says: str
) -> None:
    client = serve(Script("unused"))
    started = time.process_time()
    reply = client.post(CHAT, json={"messages": user(), "structured_outputs": outputs})
    assert time.process_time() - started < 1
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "other",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": form()},
        {"tools": [TOOL], "tool_choice": "required"},
    ],
)
def test_two_things_that_a_reply_must_be_are_refused(serve: Open, other: Any) -> None:
    """The second was ignored with a warning, or without one."""
    body = {"messages": user(), "structured_outputs": {"regex": "a"}, **other}
    reply = serve(Script("unused")).post(CHAT, json=body)
    assert reply.status_code == 400
    assert "given without another format" in reply.json()["error"]["message"]


def test_what_no_automaton_holds_is_checked_and_reported(serve: Open) -> None:
    value = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    body = {"messages": user(), "response_format": form(value)}
    got = serve(Script("[1, 1]")).post(CHAT, json=body).json()
    assert "non-unique" in got["x_warnings"][0]
    assert serve(Script("[1, 2]")).post(CHAT, json=body).json()["x_warnings"] == []


def test_max_tokens_cuts_a_structured_reply(demo: TestClient) -> None:
    body = {"messages": ASK, "response_format": form(), "max_tokens": 3, "max_denoising_steps": 3}
    got = demo.post(CHAT, json=body).json()
    assert got["usage"]["completion_tokens"] == 3
    assert got["choices"][0]["finish_reason"] == "length"
    assert got["choices"][0]["message"]["content"].startswith("{")


def test_with_tools_the_model_may_call_or_answer_in_the_schema(demo: TestClient) -> None:
    shared = {"messages": ASK, "tools": [TOOL], "response_format": form(PERSON)}
    shared |= {"seed": 1, "max_denoising_steps": 3}
    message = demo.post(CHAT, json=shared).json()["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    assert bool(calls) != bool(message["content"])
    if message["content"]:
        jsonschema.validate(json.loads(message["content"]), PERSON)


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_anthropic_takes_a_format_in_both_spellings(serve: Open, field: str) -> None:
    asked = {"type": "json_schema", "schema": PERSON}
    given = {"output_config": {"format": asked, "effort": "low"}, "output_format": asked}[field]
    body = {"messages": user(), "max_tokens": 200, field: given}
    got = serve(Script(GOOD)).post("/v1/messages", json=body).json()
    assert got["content"] == [{"type": "text", "text": GOOD}]
    assert got["x_warnings"] == []


def test_suffix_fills_between_both_sides(serve: Open, filled: Any) -> None:
    asked = filled("middle")
    body = {"prompt": "left <hole> ", "suffix": " right"}
    got = serve(Script("unused")).post("/v1/completions", json=body).json()
    assert got["choices"][0]["text"] == "middle"
    assert asked[0][0] == ["left <hole> ", Hole(), " right"]
