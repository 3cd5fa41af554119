"""Calls of tools, forced and free: the language they are held to, in each dialect."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from mlx_dgemma import Runtime
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import ServerSettings

from .conftest import Open, Script, tokenizer, user

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NAMES = ("get_weather", "get_time")
TOOLS = [{"type": "function", "function": {"name": n, "parameters": CITY}} for n in NAMES]
RIGHT = '<|tool_call>call:get_time{city:<|"|>Oslo<|"|>}<tool_call|>'
NAMED = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture(scope="module")
def demo() -> Iterator[TestClient]:
    with TestClient(create_app(Runtime(), ServerSettings()), base_url="http://127.0.0.1") as client:
        yield client


def holds(script: Script, text: str, request: int = 0) -> bool:
    """Whether the language that a request asked for holds a whole reply."""
    automaton = script.seen[request]["constraint"].automaton
    state = automaton.after(automaton.start, tokenizer().encode(text, special=True))
    return bool(automaton.accepting[state])


def test_required_leaves_the_choice_to_the_model(serve: Open) -> None:
    script = Script(RIGHT)
    asked = {"messages": user(), "tools": TOOLS, "tool_choice": "required"}
    choice = serve(script).post(CHAT, json=asked).json()["choices"][0]
    assert holds(script, RIGHT)
    assert holds(script, RIGHT.replace("time", "weather") * 2)
    for wrong in ("No.", "", f"{RIGHT} x", RIGHT.replace("city", "town")):
        assert not holds(script, wrong)
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], choice["finish_reason"]) == ("get_time", "tool_calls")


COUNTRY: Any = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "units": {"type": "array", "items": {"enum": ["c", "f"]}, "minItems": 1, "maxItems": 2},
        "note": {"anyOf": [{"type": "string", "maxLength": 9}, {"type": "null"}]},
    },
    "required": ["city", "days", "units", "note"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("forced", [True, False])
def test_arguments_fit_the_parameters(demo: TestClient, seed: int, forced: bool) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": COUNTRY}}]
    asked = {"messages": user("What is the weather in Rome?"), "tools": tools, "seed": seed}
    asked |= {"max_denoising_steps": 3}
    body = demo.post(CHAT, json={**asked, **({"tool_choice": "required"} if forced else {})}).json()
    calls = body["choices"][0]["message"].get("tool_calls") or []
    assert calls or not forced
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), COUNTRY)
    assert all("converging" in warning for warning in body["x_warnings"])


def test_thinking_is_left_out_and_said_to_be(serve: Open) -> None:
    script = Script(RIGHT)
    asked = {"messages": user(), "tools": TOOLS, "tool_choice": NAMED, "reasoning_effort": "high"}
    body = serve(script).post(CHAT, json=asked).json()
    assert script.seen[0]["enable_thinking"] is False
    assert "thinking was left out" in body["x_warnings"][0]


def test_parameters_beyond_the_rules_are_not_checked_and_said_so(serve: Open) -> None:
    odd = {"type": "function", "function": {"name": "get_time", "parameters": {"multipleOf": 0}}}
    asked = {"messages": user(), "tools": [odd], "tool_choice": "required"}
    body = serve(Script(RIGHT)).post(CHAT, json=asked).json()
    assert body["choices"][0]["message"]["tool_calls"]
    (warning,) = body["x_warnings"]
    assert warning.startswith(
        "the arguments of get_time are not checked: parameters.multipleOf is no"
    )


def test_tools_of_too_many_schemas_are_refused(serve: Open) -> None:
    large = {"properties": {f"k{i}": {"type": "integer"} for i in range(500)}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": large}}
             for i in range(41)]  # fmt: skip
    answer = serve(Script(RIGHT)).post(CHAT, json={"messages": user(), "tools": tools})
    assert answer.status_code == 400
    assert "more than 20,000 schemas" in answer.json()["error"]["message"]


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_hide_the_others(serve: Open, mode: str) -> None:
    script = Script(RIGHT)
    allowed = {"mode": mode, "tools": [NAMED]}
    asked = {"messages": user(), "tools": TOOLS,
             "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}  # fmt: skip
    assert serve(script).post(CHAT, json=asked).json()["x_warnings"] == []
    assert [tool["function"]["name"] for tool in script.seen[0]["tools"]] == ["get_time"]
    assert holds(script, RIGHT)
    assert not holds(script, RIGHT.replace("time", "weather"))
    assert holds(script, "Words.") == (mode == "auto")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_time"}])
def test_responses_force_calls_too(serve: Open, choice: Any) -> None:
    script = Script(RIGHT)
    flat = [{"type": "function", "name": name, "parameters": CITY} for name in NAMES]
    asked = {"input": "hi", "tools": flat, "tool_choice": choice}
    body = serve(script).post("/v1/responses", json=asked).json()
    assert [item["type"] for item in body["output"]] == ["function_call"]
    assert body["tool_choice"] == choice
    assert not holds(script, "No.")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_time"}])
def test_messages_force_calls_too(serve: Open, choice: Any) -> None:
    script = Script(RIGHT * 2)
    tools = [{"name": name, "input_schema": CITY} for name in NAMES]
    asked = {"messages": user(), "max_tokens": 50, "tools": tools,
             "tool_choice": {**choice, "disable_parallel_tool_use": True}}  # fmt: skip
    body = serve(script).post("/v1/messages", json=asked).json()
    assert [block["type"] for block in body["content"]] == ["tool_use"]
    assert body["content"][0]["input"] == {"city": "Oslo"}
    assert body["stop_reason"] == "tool_use"
    assert body["x_warnings"] == ["tool calls left out after the first: 1"]
    assert not holds(script, "No.")


@pytest.mark.parametrize(
    ("path", "tool", "choice"),
    [
        (MESSAGES, {"type": "web_search_20250305", "name": "web_search"},
         {"type": "tool", "name": "web_search"}),
        (MESSAGES, {"type": "web_search_20250305", "name": "web_search"}, {"type": "any"}),
        (RESPONSES, {"type": "web_search"}, {"type": "web_search"}),
        (RESPONSES, {"type": "web_search"}, "required"),
        (CHAT, {"type": "web_search"}, "required"),
    ],
)  # fmt: skip
def test_a_call_of_what_the_server_does_not_run_cannot_be_forced(
    serve: Open, path: str, tool: Any, choice: Any
) -> None:
    """An invented result would be worse: Claude Code shows this sentence as its search's result."""
    asked = {"messages": user(), "input": "hi", "max_tokens": 9, "tools": [tool]}
    answer = serve(Script("x")).post(path, json={**asked, "tool_choice": choice})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("tool_choice asks for web_search, which this server does not run")
