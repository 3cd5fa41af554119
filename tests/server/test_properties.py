"""Requests of the published shapes, right and wrong: always an answer, never a server's error."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mlx_dgemma.constraints import LanguageError
from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.infilling import Filling, Infill
from mlx_dgemma.server import engine as engine_module
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.structured import Wanted

from .conftest import Open, Script, tokenizer

words = st.sampled_from(["", "a", "get_time", "call:x", "two words", "<hole>", "<|turn>", "é\n"])
numbers = st.sampled_from([-1, 0, 1, 2, 3.5, 10**30, True])
leaves = st.one_of(st.none(), words, numbers)
json_values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=2) | st.dictionaries(words, v, max_size=2), max_leaves=4
)


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, max_size=2)
    named = st.dictionaries(words, inner, max_size=3)
    kind = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null"])
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": kind | st.lists(kind, max_size=2) | words,
        "enum": st.lists(json_values, max_size=3),
        "const": json_values,
        "properties": named,
        "required": st.lists(words, max_size=2),
        "additionalProperties": st.booleans() | inner,
        "items": inner | st.just(False),
        "prefixItems": several,
        "pattern": st.sampled_from(["^a$", "^[0-9]{2}-x$", "^(a+)+$", "^\\d+$", "(", "^[z-a]$"]),
        "$ref": st.sampled_from(["#", "#/$defs/a", "#/properties/a", "x"]),
        "$defs": st.dictionaries(st.just("a"), inner, max_size=1),
        "format": words,
    }
    keywords |= dict.fromkeys(("allOf", "anyOf", "oneOf"), several)
    bounds = ("minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "multipleOf")
    keywords |= dict.fromkeys((*bounds, "minItems", "maxItems", "uniqueItems"), numbers)
    return st.fixed_dictionaries({}, optional=keywords)


schemas = st.recursive(st.one_of(st.booleans(), json_values), _schemas, max_leaves=6)
function = st.fixed_dictionaries({"name": words}, optional={"parameters": schemas})
tool = st.one_of(
    st.fixed_dictionaries({"type": st.just("function"), "function": function}),
    st.builds(lambda f: {"type": "function", **f}, function),
    st.fixed_dictionaries({"name": words, "input_schema": schemas}),
    json_values,
)
named = st.fixed_dictionaries({"name": words})
tool_choice = st.one_of(
    st.sampled_from(["none", "auto", "required", "perhaps"]),
    st.fixed_dictionaries({"type": st.just("function"), "function": named}),
    st.fixed_dictionaries({"type": st.sampled_from(["function", "tool", "any"]), "name": words}),
    st.fixed_dictionaries(
        {"type": st.just("allowed_tools"), "mode": words | st.just("required"),
         "tools": st.lists(named, max_size=2)}
    ),
    json_values,
)  # fmt: skip
form = st.one_of(
    st.just({"type": "json_object"}),
    st.builds(lambda s: {"type": "json_schema", "schema": s}, schemas),
    st.builds(lambda s: {"type": "json_schema", "json_schema": {"schema": s}}, schemas),
    json_values,
)
call = st.fixed_dictionaries(
    {"id": words, "type": st.just("function"),
     "function": st.fixed_dictionaries({"name": words, "arguments": words | st.just('{"a": 1}')})}
)  # fmt: skip
message = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": words}),
    st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": st.lists(call, max_size=2)}),
    st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": words, "content": words}),
)
optional = {
    "tools": st.lists(tool, max_size=2),
    "tool_choice": tool_choice,
    "response_format": form,
    "text": st.fixed_dictionaries({"format": form}),
    "parallel_tool_calls": st.booleans() | leaves,
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_drafts": st.booleans() | leaves}),
    "n": numbers,
    "seed": numbers,
    "stop": st.lists(words, max_size=2) | words,
    "suffix": words,
    "echo": st.booleans(),
    "logprobs": st.booleans() | numbers,
}
body = st.fixed_dictionaries(
    {"messages": st.lists(message, min_size=1, max_size=3), "prompt": words,
     "input": words | st.lists(message, max_size=2),
     "max_tokens": st.sampled_from([9, 9, 9, 0, 4.5, None])},
    optional=optional,
)  # fmt: skip
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
REPLY = '{"a": 1}<|tool_call>call:get_time{city:<|"|>Oslo<|"|>}<tool_call|>'


@pytest.fixture
def client(serve: Open, monkeypatch: pytest.MonkeyPatch) -> Any:
    def infill_turns(_m: Any, _t: Any, parts: Any, **_: Any) -> Iterator[Any]:
        text = "".join(part if isinstance(part, str) else "1" for part in parts)
        yield Infill(text, (Filling("1", (0, 1), 1, ()),), 0.0, 0, 1, True, 1)

    monkeypatch.setattr(engine_module, "infill_turns", infill_turns)
    return serve(Script(REPLY))


@settings(max_examples=150)
@given(path=st.sampled_from(PATHS), body=body)
def test_every_request_gets_an_answer_or_a_reason(client: Any, path: str, body: Any) -> None:
    response = client.post(path, json=body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code == 200:
        assert '"error": {"message"' not in response.text
    else:
        assert response.json()["error"]["message"].endswith(".")


@settings(max_examples=300)
@given(schemas)
def test_any_schema_is_a_language_or_refused(schema: Any) -> None:
    try:
        wanted = Wanted.schema(schema, "response_format")
        language = wanted.constraint.language(tokenizer(), 896)
    except (ApiError, LanguageError) as refused:
        event(f"refused as {type(refused).__name__}")
        return
    shortest = _shortest(language.automaton)
    assert wanted.rules is not None
    wrong = wanted.rules.violation(json.loads(tokenizer().decode(shortest)))
    assert wrong is None or language.unchecked, wrong


def _shortest(automaton: Automaton) -> list[int]:
    """Ids of a shortest text."""
    ids: list[int] = []
    state = automaton.start
    while not automaton.accepting[state]:
        alive = automaton.alive(state)
        reached = automaton.table(np.array([state]), alive)[0]
        best = int(np.where(reached > 0, automaton.least[reached], 1 << 50).argmin())
        assert automaton.least[reached[best]] < automaton.least[state]
        ids.append(int(alive[best]))
        state = int(reached[best])
    return ids
