"""POST /v1/chat/completions: what clients send, what they get, block edges nowhere to be seen."""

import json
import re
from typing import Any

import pytest

from mlx_dgemma.errors import NumericsError

from .conftest import Open, Script, user

URL = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}
CALL = '<|tool_call>call:look{q:<|"|>a {b}<|"|>,n:[1,null]}<tool_call|>'
THOUGHT = "<|channel>thought\nhm, hm\n<channel|>"


def events(text: str) -> list[Any]:
    """The JSON of a stream; the final [DONE] must be there and is left out."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def deltas(chunks: list[Any], index: int = 0) -> list[Any]:
    found = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return [c["delta"] for c in found]


def joined(chunks: list[Any], name: str, index: int = 0) -> str:
    return "".join(delta.get(name) or "" for delta in deltas(chunks, index))


def test_a_reply(serve: Open) -> None:
    body = serve(Script("Hello there")).post(URL, json={"messages": user(), "seed": 7}).json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there"}
    assert choice["finish_reason"] == "stop"
    assert choice["x_diffusion"]["seed"] == 7
    assert body["usage"]["total_tokens"] == (
        body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    )
    assert body["x_warnings"] == []
    assert body["id"].startswith("chatcmpl-")


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_streaming_gives_the_same_reply_at_any_block_edge(serve: Open, block: int) -> None:
    reply = f"{THOUGHT}Well, é\U0001f9e9 {CALL}{CALL}"
    asked = {"messages": user(), "tools": [TOOL], "enable_thinking": True}
    client = serve(Script(reply, block=block))
    whole = client.post(URL, json=asked).json()["choices"][0]
    chunks = events(client.post(URL, json={**asked, "stream": True}).text)
    assert joined(chunks, "content") == whole["message"]["content"] == "Well, é\U0001f9e9 "
    assert joined(chunks, "reasoning") == whole["message"]["reasoning"] == "hm, hm"
    assert joined(chunks, "reasoning_content") == whole["message"]["reasoning_content"]
    calls = [call for delta in deltas(chunks) for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2
    arguments = [json.loads(call["function"]["arguments"]) for call in calls]
    assert arguments == [{"q": "a {b}", "n": [1, None]}] * 2
    assert [c["function"] for c in calls] == [c["function"] for c in whole["message"]["tool_calls"]]
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert reasons[-1] == whole["finish_reason"] == "tool_calls"
    assert "<|" not in json.dumps([chunks, whole])


def test_usage_comes_when_asked(serve: Open) -> None:
    client = serve(Script("Hello"))
    asked = {"messages": user(), "stream": True}
    assert all("usage" not in chunk for chunk in events(client.post(URL, json=asked).text))
    options = {"stream_options": {"include_usage": True}}
    last = events(client.post(URL, json={**asked, **options}).text)[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0


def test_drafts_come_only_when_asked(serve: Open) -> None:
    client = serve(Script("Hello there, world"))
    asked = {"messages": user(), "stream": True}
    assert "x_draft" not in client.post(URL, json=asked).text
    options = {"stream_options": {"include_drafts": True}}
    chunks = events(client.post(URL, json={**asked, **options}).text)
    drafts = [chunk["x_draft"] for chunk in chunks if "x_draft" in chunk]
    assert all(chunk["choices"] == [] for chunk in chunks if "x_draft" in chunk)
    assert [(d["block"], d["step"]) for d in drafts[:2]] == [(0, 1), (0, 2)]
    first, second = drafts[:2]
    assert first["changed"] == [[0, 8]]
    assert (first["mean_entropy"], second["mean_entropy"]) == (0.5, 0.25)
    assert (
        "".join(second["tokens"]) == second["text"] == "Hello there, world"[: len(second["text"])]
    )
    assert len(second["entropy"]) == len(second["accepted"]) == len(second["tokens"])
    assert joined(chunks, "content") == "Hello there, world"


@pytest.mark.parametrize("block", [1, 2, 5])
def test_stop_strings_across_block_edges(serve: Open, block: int) -> None:
    client = serve(Script("one two END three", block=block))
    for stop in ("END", ["zzz", "END"]):
        asked = {"messages": user(), "stop": stop}
        choice = client.post(URL, json=asked).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("one two ", "stop")
        chunks = events(client.post(URL, json={**asked, "stream": True}).text)
        assert joined(chunks, "content") == "one two "


def test_length(serve: Open) -> None:
    client = serve(Script("one two three four five six seven"))
    for name in ("max_tokens", "max_completion_tokens"):
        body = client.post(URL, json={"messages": user(), name: 4}).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 4


def test_several_choices_use_seeds_in_a_row(serve: Open) -> None:
    script = Script("same")
    client = serve(script)
    body = client.post(URL, json={"messages": user(), "n": 3, "seed": 5}).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert sorted(call["seed"] for call in script.seen) == [5, 6, 7]
    assert [c["x_diffusion"]["seed"] for c in body["choices"]] == [5, 6, 7]
    chunks = events(client.post(URL, json={"messages": user(), "n": 2, "stream": True}).text)
    assert [joined(chunks, "content", i) for i in (0, 1)] == ["same", "same"]


def test_logprobs_of_committed_tokens(serve: Open) -> None:
    client = serve(Script("Hello é"))
    asked = {"messages": user(), "logprobs": True}
    whole = client.post(URL, json=asked).json()["choices"][0]
    scored = whole["logprobs"]["content"]
    assert "".join(entry["token"] for entry in scored).startswith("Hello")
    assert all(entry["logprob"] == -0.25 for entry in scored)
    chunks = events(client.post(URL, json={**asked, "stream": True}).text)
    streamed = [c["logprobs"]["content"] for k in chunks for c in k["choices"] if c["logprobs"]]
    assert [entry for part in streamed for entry in part] == scored


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_fit_the_text_and_pads_are_not_listed(serve: Open, stream: bool) -> None:
    client = serve(Script("Hi<pad> \u00e9\U0001f9e9 so", block=3))
    asked = {"prompt": "Once ", "logprobs": 1, "stream": stream}
    answer = client.post("/v1/completions", json=asked)
    bodies = events(answer.text) if stream else [answer.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    text = "".join(choice["text"] for choice in choices)
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens = [token for part in parts for token in part["tokens"]]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    assert "<pad>" not in tokens
    assert "".join(tokens) == text
    assert all(text[at : at + len(t)] == t for at, t in zip(offsets, tokens, strict=True))
    chat = client.post(URL, json={"messages": user(), "logprobs": True}).json()["choices"][0]
    assert "<pad>" not in [entry["token"] for entry in chat["logprobs"]["content"]]


def test_fields_reach_the_model(serve: Open) -> None:
    script = Script("ok")
    client = serve(script)
    knobs = {"max_denoising_steps": 12, "entropy_bound": 0.2, "canvas_length": 8,
             "sampler": "confidence-threshold", "on_unconverged": "refuse"}  # fmt: skip
    asked = {"messages": user(), "temperature": 0, "max_tokens": 9, "tools": [TOOL], **knobs}
    assert client.post(URL, json=asked).json()["x_warnings"] == []
    (seen,) = script.seen
    assert {name: seen[name] for name in knobs} == knobs
    assert (seen["temp"], seen["max_tokens"], seen["enable_thinking"]) == (0.0, 9, False)
    assert seen["tools"] == [TOOL]


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning": {"effort": "low"}}, True),
        ({"reasoning": {"enabled": False, "effort": "low"}}, False),
    ],
)
def test_thinking_is_off_unless_asked(serve: Open, fields: Any, thinking: bool) -> None:
    script = Script("ok")
    body = serve(script).post(URL, json={"messages": user(), **fields}).json()
    assert script.seen[0]["enable_thinking"] is thinking
    assert body["x_warnings"] == []


def test_what_has_no_effect_is_said(serve: Open) -> None:
    asked = {"messages": user(), "top_p": 0.9, "presence_penalty": 1, "shoe_size": 43,
             "max_tokens": 10**6, "frequency_penalty": 0, "user": "me"}  # fmt: skip
    warnings = serve(Script("ok")).post(URL, json=asked).json()["x_warnings"]
    words = {re.split(r"\W", warning)[0] for warning in warnings}
    assert words == {"max_tokens", "top_p", "presence_penalty", "shoe_size"}


def test_a_malformed_call_is_content_with_a_flag(serve: Open) -> None:
    client = serve(Script("<|tool_call>call:look{q<tool_call|>"))
    asked = {"messages": user(), "tools": [TOOL]}
    body = client.post(URL, json=asked).json()
    choice = body["choices"][0]
    assert choice["message"]["content"] == "call:look{q"
    assert choice["message"]["x_malformed_tool_calls"] == ["call:look{q"]
    assert choice["finish_reason"] == "stop"
    assert body["x_warnings"] == ["a malformed tool call was returned as content"]
    chunks = events(client.post(URL, json={**asked, "stream": True}).text)
    assert joined(chunks, "content") == "call:look{q"
    assert ["call:look{q"] in [d.get("x_malformed_tool_calls") for d in deltas(chunks)]


def test_one_call_when_parallel_calls_are_off(serve: Open) -> None:
    client = serve(Script(CALL + CALL))
    asked = {"messages": user(), "tools": [TOOL], "parallel_tool_calls": False}
    message = client.post(URL, json=asked).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1
    chunks = events(client.post(URL, json={**asked, "stream": True}).text)
    assert sum(len(delta.get("tool_calls", [])) for delta in deltas(chunks)) == 1


def test_tool_choice_none_hides_the_tools(serve: Open) -> None:
    script = Script("ok")
    asked = {"messages": user(), "tools": [TOOL], "tool_choice": "none"}
    assert serve(script).post(URL, json=asked).status_code == 200
    assert script.seen[0]["tools"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "elf", "content": "x"}]}, "messages[0].role"),
        ({"messages": user([{"type": "image_url"}])}, "messages[0].content[0]"),
        ({"messages": user([{"type": "input_audio"}])}, "messages[0].content[0]"),
        ({"n": 0}, "n"),
        ({"n": 99}, "n"),
        ({"n": True}, "n"),
        ({"seed": -2}, "seed"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": {}}, "tools"),
        ({"tools": [{}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TOOL]},
         "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": []}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"sampler": "magic"}, "sampler"),
        ({"t_min": 0}, "t_min"),
        ({"canvas_length": 10**9}, "canvas_length"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"model": "gpt-9"}, "model"),
    ],
)  # fmt: skip
def test_bad_fields_are_named(serve: Open, fields: Any, param: str) -> None:
    response = serve(Script("ok")).post(URL, json={"messages": user(), **fields})
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error["param"] == param
    assert error["message"].endswith(".")


def test_a_prompt_that_does_not_fit(serve: Open) -> None:
    client = serve(Script("ok"), max_prompt_tokens=12)
    response = client.post(URL, json={"messages": user("word " * 40)})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("words", "counted"), [(20, "resulted in"), (60, "resulted in at least 51")]
)
def test_words_of_enums_are_counted_before_they_are_rendered(
    serve: Open, words: int, counted: str
) -> None:
    """Each is three tokens at least; 240,000 of them took the template 8 seconds."""
    parameters = {"properties": {"p": {"type": "string", "enum": ["a"] * words}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    client = serve(Script("ok"), max_prompt_tokens=50)
    response = client.post(URL, json={"messages": user(), "tools": tools})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert counted in response.json()["error"]["message"]


def test_a_failing_network_is_an_error_not_an_end(serve: Open) -> None:
    script = Script(NumericsError("The logits are not finite: step 1."), "fine")
    client = serve(script)
    response = client.post(URL, json={"messages": user()})
    assert response.status_code == 500
    assert "not finite" in response.json()["error"]["message"]
    assert client.post(URL, json={"messages": user()}).status_code == 200


def test_a_bug_stays_in_the_log(serve: Open, caplog: pytest.LogCaptureFixture) -> None:
    client = serve(Script(RuntimeError("secret detail")))
    response = client.post(URL, json={"messages": user()})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret detail" in caplog.text
    text = client.post(URL, json={"messages": user(), "stream": True}).text
    assert (
        json.loads(text.split("\n\n")[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    )


def test_a_context_in_8_bits_is_the_operators_choice(serve: Open) -> None:
    """Goes with every request; without it the keyword stays away."""
    for settings, given in (({"kv_bits": 8}, 8), ({}, None)):
        script = Script("Yes.")
        client = serve(script, **settings)
        assert client.post(URL, json={"messages": user()}).status_code == 200
        assert script.seen[-1].get("kv_bits") == given
