"""Forced tool calls: what is pinned, what is checked and tried again, in each dialect."""

from typing import Any

import pytest

from mlx_dgemma.server.tool_choice import opening

from .conftest import Open, Script, tokenizer, user

CHAT = "/v1/chat/completions"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NAMES = ("get_weather", "get_time")
TOOLS = [{"type": "function", "function": {"name": n, "parameters": CITY}} for n in NAMES]
RIGHT = '<|tool_call>call:get_time{city:<|"|>Oslo<|"|>}<tool_call|>'
NAMED = {"type": "function", "function": {"name": "get_time"}}


def begun(script: Script, request: int = 0) -> tuple[str, set[str]]:
    """What a request's opening pins, and what it allows behind."""
    pinned = script.seen[request]["opening"]
    return tokenizer().decode(pinned.ids), {tokenizer().decode([i]) for i in pinned.following}


ODD = {"type": "object", "properties": {"a b": {}, "n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("parameters", "begins"),
    [
        (CITY, 'call:a{city:<|"|>'),
        (ODD, "call:a{n:"),
        ({**ODD, "required": ["a b"]}, "call:a{"),
        ({**CITY, "required": 3}, "call:a{"),
        ({**CITY, "properties": {"city": 3}}, "call:a{city:"),
        ({}, "call:a{"),
    ],
)
def test_an_opening_reaches_into_the_first_required_argument(parameters: Any, begins: str) -> None:
    tool = {"type": "function", "function": {"name": "a", "parameters": parameters}}
    pinned = opening(tokenizer(), [tool])
    assert tokenizer().decode(pinned.ids) == f"<|tool_call>{begins}"
    assert pinned.following == ()


def test_tools_share_an_opening_as_far_as_it_goes() -> None:
    pinned = opening(tokenizer(), TOOLS)
    assert tokenizer().decode(pinned.ids) == "<|tool_call>call:get_"
    assert {tokenizer().decode([id_]) for id_ in pinned.following} == {"weather", "time"}
    assert opening(tokenizer(), [*TOOLS, *TOOLS[:1]]) == pinned


def test_required_leaves_the_choice_to_the_model(serve: Open) -> None:
    script = Script(RIGHT)
    asked = {"messages": user(), "tools": TOOLS, "tool_choice": "required"}
    choice = serve(script).post(CHAT, json=asked).json()["choices"][0]
    assert begun(script) == ("<|tool_call>call:get_", {"weather", "time"})
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], choice["finish_reason"]) == ("get_time", "tool_calls")


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_is_tried_until_it_fits(serve: Open, stream: bool) -> None:
    wrong = ["No.", RIGHT.replace("time", "weather"), RIGHT.replace("city", "town")]
    script = Script(*wrong, RIGHT)
    asked = {"messages": user(), "tools": TOOLS, "tool_choice": NAMED, "stream": stream, "seed": 3}
    text = serve(script).post(CHAT, json=asked).text
    assert begun(script) == ('<|tool_call>call:get_time{city:<|"|>', set())
    assert '{\\"city\\": \\"Oslo\\"}' in text
    assert "weather" not in text
    assert "town" not in text
    assert "attempts" not in text
    assert len({seen["seed"] for seen in script.seen}) == 4
    assert script.seen[0]["seed"] == 3


def test_a_call_that_never_fits_is_reported(serve: Open) -> None:
    script = Script("No.")
    asked = {"messages": user(), "tools": TOOLS, "tool_choice": "required"}
    body = serve(script).post(CHAT, json=asked).json()
    assert len(script.seen) == 4
    assert body["choices"][0]["message"]["content"] == "No."
    assert "after 4 attempts" in body["x_warnings"][0]
    assert "it calls no tool" in body["x_warnings"][0]


def test_a_reply_cut_short_is_not_tried_again(serve: Open) -> None:
    script = Script(RIGHT)
    asked = {"messages": user(), "tools": TOOLS, "tool_choice": NAMED, "max_tokens": 4}
    body = serve(script).post(CHAT, json=asked).json()
    assert len(script.seen) == 1
    assert body["choices"][0]["finish_reason"] == "length"
    assert "after 1 attempts" in body["x_warnings"][0]
    assert body["choices"][0]["message"].get("tool_calls") is None


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


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_hide_the_others(serve: Open, mode: str) -> None:
    script = Script(RIGHT)
    allowed = {"mode": mode, "tools": [NAMED]}
    asked = {"messages": user(), "tools": TOOLS,
             "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}  # fmt: skip
    assert serve(script).post(CHAT, json=asked).json()["x_warnings"] == []
    assert [tool["function"]["name"] for tool in script.seen[0]["tools"]] == ["get_time"]
    assert ("opening" in script.seen[0]) == (mode == "required")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_time"}])
def test_responses_force_calls_too(serve: Open, choice: Any) -> None:
    script = Script("No.", RIGHT)
    flat = [{"type": "function", "name": name, "parameters": CITY} for name in NAMES]
    asked = {"input": "hi", "tools": flat, "tool_choice": choice}
    body = serve(script).post("/v1/responses", json=asked).json()
    assert [item["type"] for item in body["output"]] == ["function_call"]
    assert body["tool_choice"] == choice
    assert len(script.seen) == 2


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_time"}])
def test_messages_force_calls_too(serve: Open, choice: Any) -> None:
    script = Script("No.", RIGHT * 2)
    tools = [{"name": name, "input_schema": CITY} for name in NAMES]
    asked = {"messages": user(), "max_tokens": 50, "tools": tools,
             "tool_choice": {**choice, "disable_parallel_tool_use": True}}  # fmt: skip
    body = serve(script).post("/v1/messages", json=asked).json()
    assert [block["type"] for block in body["content"]] == ["tool_use"]
    assert body["content"][0]["input"] == {"city": "Oslo"}
    assert body["stop_reason"] == "tool_use"
    assert body["x_warnings"] == ["tool calls left out behind the first: 1"]
    assert len(script.seen) == 2
