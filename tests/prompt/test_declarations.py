"""Tool schemas in the small language that templates render: no garbage, nothing lost."""

from typing import Any

import pytest

from mlx_dgemma.prompt.chat_template import encode_messages
from mlx_dgemma.prompt.declarations import plain_parameters
from mlx_dgemma.prompt.tokenizer import Tokenizer

STRING = {"type": "string"}
ADDRESS = {"type": "object", "properties": {"city": STRING}, "required": ["city"]}


@pytest.mark.parametrize(
    ("schema", "plain"),
    [
        ({"type": ["string", "null"]}, {"type": "string", "nullable": True}),
        ({"type": ["null"]}, {"type": "null"}),
        ({"type": ["integer", "string"]}, {"type": "integer", "description": "integer or string"}),
        ({"anyOf": [STRING, {"type": "null"}]}, {"type": "string", "nullable": True}),
        (
            {"anyOf": [STRING, {"type": "integer"}], "description": "id"},
            {"type": "string", "description": "id (one of: string; integer)"},
        ),
        (
            {"oneOf": [{"const": "a"}, {"const": "b"}]},
            {"type": "string", "enum": ["a", "b"]},
        ),
        ({"const": 3}, {"type": "integer", "description": "one of 3"}),
        (
            {"enum": ["a", None]},
            {"type": "string", "enum": ["a"], "nullable": True},
        ),
        ({"enum": [1, 2], "type": "integer"}, {"type": "integer", "description": "one of 1, 2"}),
        ({}, {"type": "string", "description": "any JSON value"}),
        (True, {"type": "string", "description": "any JSON value"}),
        ({"$ref": "#/$defs/Address"}, ADDRESS),
        (
            {"allOf": [{"$ref": "#/$defs/Address"}], "description": "x"},
            {**ADDRESS, "description": "x"},
        ),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            {"type": "object", "properties": {}, "description": "any keys; each value: integer"},
        ),
        (
            {"type": "array", "prefixItems": [STRING, {"type": "number"}]},
            {"type": "array", "description": "in this order: string, number"},
        ),
        (
            {"type": "array", "items": {"anyOf": [STRING, {"type": "null"}]}},
            {"type": "array", "items": {"type": "string", "nullable": True}},
        ),
        (
            {
                "anyOf": [
                    {"type": "object", "properties": {"kind": {"const": "cat"}, "name": STRING},
                     "required": ["kind", "name"]},
                    {"type": "object", "properties": {"kind": {"const": "dog"}, "age": STRING},
                     "required": ["kind"]},
                ]
            },
            {
                "type": "object",
                "properties": {"kind": {"type": "string", "enum": ["cat", "dog"]}, "name": STRING,
                               "age": STRING},
                "required": ["kind"],
                "description": "one of: object with kind, name; object with kind, age",
            },
        ),
    ],
)  # fmt: skip
def test_a_property(schema: Any, plain: dict[str, Any]) -> None:
    parameters = {"type": "object", "properties": {"x": schema}, "$defs": {"Address": ADDRESS}}
    assert plain_parameters(parameters)["properties"]["x"] == plain


def test_a_recursive_schema_is_written_once() -> None:
    child = {"$ref": "#/$defs/Node"}
    node = {"type": "object", "properties": {"left": child, "right": {"anyOf": [child, child]}}}
    plain = plain_parameters({"$ref": "#/$defs/Node", "$defs": {"Node": node}})
    left, right = plain["properties"]["left"], plain["properties"]["right"]
    assert left == {"type": "object", "properties": {}}
    assert right["properties"] == {}
    for loop in ({"$ref": "#/$defs/A"}, {"allOf": [{"$ref": "#/$defs/A"}] * 3}):
        assert plain_parameters({**loop, "$defs": {"A": loop}})["type"] == "object"


def test_a_bomb_of_references_stays_small() -> None:
    defs = {f"D{i}": {"properties": {k: {"$ref": f"#/$defs/D{i + 1}"} for k in "abcdefgh"}}
            for i in range(12)}  # fmt: skip
    plain = plain_parameters({"$ref": "#/$defs/D0", "$defs": defs})
    assert len(str(plain)) < 300_000


def test_a_schema_in_the_small_language_stays() -> None:
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Which", "enum": ["Oslo", "Rome"]},
            "days": {"type": "array", "items": {"type": "integer", "description": "a day"}},
            "where": ADDRESS,
        },
        "required": ["city"],
    }
    assert plain_parameters(parameters) == parameters


def test_what_the_model_reads_of_a_union(tokenizer: Tokenizer) -> None:
    optional = {"anyOf": [{"type": "string"}, {"type": "null"}], "title": "City", "default": None}
    parameters = {"properties": {"city": optional, "n": {"type": ["integer", "null"]}}}
    tool = {"type": "function", "function": {"name": "f", "description": "d"}}
    tool["function"]["parameters"] = parameters
    ids = encode_messages(tokenizer, [{"role": "user", "content": "a"}], tools=[tool])
    rendered = tokenizer.decode(ids)
    assert 'city:{nullable:true,type:<|"|>STRING<|"|>}' in rendered
    assert 'n:{nullable:true,type:<|"|>INTEGER<|"|>}' in rendered
    assert rendered.count('type:<|"|>OBJECT<|"|>}') == 1


def test_a_long_chain_of_references_is_cut_short() -> None:
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
    whole = {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": {**chain, "d5000": {}}}
    assert plain_parameters(whole)["properties"]["a"]["type"] == "object"
