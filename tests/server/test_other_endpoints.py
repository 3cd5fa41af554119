"""/v1/completions, /v1/responses, /v1/messages, /v1/models, /health, /metrics."""

import json
from typing import Any

import pytest

from .conftest import Open, Script, tokenizer, user

CALL = '<|tool_call>call:look{q:<|"|>x<|"|>}<tool_call|>'
RESULT = [{"type": "text", "text": "r"}]
REPLY = f"<|channel>thought\nhm\n<channel|>Yes.{CALL}"
FLAT = {"type": "function", "name": "look", "description": "d", "parameters": {"type": "object"}}
ANTHROPIC = {"name": "look", "description": "d", "input_schema": {"type": "object"}}


def named_events(text: str) -> list[tuple[str, Any]]:
    found = []
    for entry in text.strip().split("\n\n"):
        event, data = entry.split("\n")
        found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(data["type"] == event for event, data in found)
    return found


def test_completion_of_raw_text(serve: Open) -> None:
    script = Script("and more")
    client = serve(script)
    ids = [tokenizer().ids["bos"], *tokenizer().encode("Once <turn|>")]
    body = client.post("/v1/completions", json={"prompt": "Once <turn|>", "echo": True}).json()
    assert body["choices"][0]["text"] == "Once <turn|>and more"
    assert body["object"] == "text_completion"
    client.post("/v1/completions", json={"prompt": ids})
    client.post("/v1/completions", json={"prompt": [ids]})
    assert [call["prompt"].ids for call in script.seen] == [ids] * 3
    assert not tokenizer().control_ids & set(ids[1:])


def test_completion_stream(serve: Open) -> None:
    asked = {"prompt": "a", "stream": True, "logprobs": 1, "n": 2,
             "stream_options": {"include_usage": True}}  # fmt: skip
    lines = serve(Script("one two three")).post("/v1/completions", json=asked).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in mine) == "one two three"
        assert mine[-1]["finish_reason"] == "stop"
        assert all(len(c["logprobs"]["tokens"]) for c in mine[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [({}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["a", []]}, "prompt"),
     ({"prompt": ["a"] * 69}, "prompt"),
     ({"prompt": ["a", "b"], "suffix": "c"}, "suffix"),
     ({"prompt": [1, "a"]}, "prompt"), ({"prompt": "a", "suffix": "b", "stop": "c"}, "suffix"),
     ({"prompt": "a", "logprobs": True}, "logprobs"), ({"prompt": 3}, "prompt")],
)  # fmt: skip
def test_bad_completions(serve: Open, fields: Any, param: str) -> None:
    response = serve(Script("x")).post("/v1/completions", json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_response(serve: Open) -> None:
    client = serve(Script(REPLY))
    asked = {"input": "hi", "tools": [FLAT], "reasoning": {"effort": "low"}, "instructions": "Be."}
    body = client.post("/v1/responses", json=asked).json()
    kinds = [item["type"] for item in body["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    thought, message, call = body["output"]
    assert thought["content"][0]["text"] == "hm"
    assert message["content"][0]["text"] == "Yes."
    assert (call["name"], json.loads(call["arguments"])) == ("look", {"q": "x"})
    assert (body["status"], body["x_warnings"]) == ("completed", [])
    usage = body["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("block", [1, 3, 100])
def test_response_stream_rebuilds_the_response(serve: Open, block: int) -> None:
    client = serve(Script(REPLY, block=block))
    asked = {"input": "hi", "tools": [FLAT], "stream": True}
    found = named_events(client.post("/v1/responses", json=asked).text)
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    assert (found[0][0], found[-1][0]) == ("response.created", "response.completed")
    output = found[-1][1]["response"]["output"]
    done = [data["item"] for kind, data in found if kind == "response.output_item.done"]
    assert done == output
    text = "".join(d["delta"] for kind, d in found if kind == "response.output_text.delta")
    assert text == output[1]["content"][0]["text"] == "Yes."
    arguments = [d["delta"] for k, d in found if k == "response.function_call_arguments.delta"]
    assert "".join(arguments) == output[2]["arguments"]
    opened = [d["item"]["id"] for k, d in found if k == "response.output_item.added"]
    assert opened == [item["id"] for item in output]


def test_response_input_items_become_the_conversation(
    serve: Open, conversations: list[Any]
) -> None:
    script = Script("ok")
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"q": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": "two"},
    ]
    asked = {"input": items, "instructions": "Be brief."}
    assert serve(script).post("/v1/responses", json=asked).status_code == 200
    system, question, calls, first, second = conversations[0]
    assert (system["role"], system["content"]) == ("system", "Be brief.")
    assert question["role"] == "user"
    assert calls["reasoning"] == "t"
    assert [call["id"] for call in calls["tool_calls"]] == ["c1", "c2"]
    assert (first["content"], second["tool_call_id"]) == ("one", "c2")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({}, "input"), ({"input": 3}, "input"), ({"input": [{"type": "x"}]}, "messages"),
     ({"input": [3]}, "input[0]"), ({"input": "a", "conversation": "r"}, "conversation"),
     ({"input": "a", "previous_response_id": "resp_x"}, "previous_response_id"),
     ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
     ({"input": "a", "max_output_tokens": 0}, "max_output_tokens")],
)  # fmt: skip
def test_bad_responses(serve: Open, fields: Any, param: str) -> None:
    response = serve(Script("x")).post("/v1/responses", json=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_response_cut_short_is_incomplete(serve: Open) -> None:
    asked = {"input": "hi", "max_output_tokens": 2}
    body = serve(Script("one two three four")).post("/v1/responses", json=asked).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


def test_message(serve: Open, conversations: list[Any]) -> None:
    script = Script(REPLY)
    asked = {"messages": user(), "max_tokens": 100, "tools": [ANTHROPIC], "system": "Be.",
             "thinking": {"type": "enabled", "budget_tokens": 50}}  # fmt: skip
    body = serve(script).post("/v1/messages", json=asked).json()
    assert [block["type"] for block in body["content"]] == ["thinking", "text", "tool_use"]
    assert body["content"][2]["input"] == {"q": "x"}
    assert (body["stop_reason"], body["stop_sequence"]) == ("tool_use", None)
    assert script.seen[0]["enable_thinking"] is True
    assert script.seen[0]["tools"][0]["function"]["name"] == "look"
    assert conversations[0][0] == {"role": "system", "content": "Be."}


@pytest.mark.parametrize("block", [1, 3, 100])
def test_message_stream_rebuilds_the_message(serve: Open, block: int) -> None:
    client = serve(Script(REPLY, block=block))
    asked = {"messages": user(), "max_tokens": 100, "stream": True, "tools": [ANTHROPIC]}
    found = named_events(client.post("/v1/messages", json=asked).text)
    blocks: dict[int, str] = {}
    for kind, data in found:
        if kind == "content_block_delta":
            delta = data["delta"]
            piece = delta.get("text") or delta.get("thinking") or delta.get("partial_json")
            blocks[data["index"]] = blocks.get(data["index"], "") + piece
    assert blocks == {0: "hm", 1: "Yes.", 2: '{"q": "x"}'}
    kinds = [kind for kind, _ in found]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert found[-2][1]["delta"]["stop_reason"] == "tool_use"


def test_message_stop_sequence_is_named(serve: Open) -> None:
    asked = {"messages": user(), "max_tokens": 100, "stop_sequences": ["END", "FIN"]}
    body = serve(Script("one FIN two")).post("/v1/messages", json=asked).json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "FIN")
    assert body["content"][0]["text"] == "one "


def test_message_tool_results_become_tool_messages(serve: Open, conversations: list[Any]) -> None:
    script = Script("ok")
    conversation = [
        *user("a"),
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"},
            {"type": "tool_use", "id": "u1", "name": "look", "input": {"q": "x"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "u1", "content": RESULT},
            {"type": "text", "text": "and?"},
        ]},
    ]  # fmt: skip
    asked = {"messages": conversation, "max_tokens": 10}
    client = serve(script)
    assert client.post("/v1/messages", json=asked).status_code == 200
    _, calls, result, question = conversations[0]
    assert (calls["reasoning"], calls["tool_calls"][0]["id"]) == ("t", "u1")
    assert result == {"role": "tool", "tool_call_id": "u1", "content": "r"}
    assert question["content"][0]["text"] == "and?"
    counted = client.post("/v1/messages/count_tokens", json={"messages": conversation}).json()
    assert counted["input_tokens"] > 10


@pytest.mark.parametrize(
    "fields",
    [{"messages": user()}, {"max_tokens": 3}, {"messages": user(), "max_tokens": 0},
     {"messages": [{"role": "user", "content": 3}], "max_tokens": 3},
     {"messages": user([{"type": "image", "source": {}}]), "max_tokens": 3},
     {"messages": user(), "max_tokens": 3, "tool_choice": {"type": "any"}},
     {"messages": user(), "max_tokens": 3, "tool_choice": {"type": "tool"}, "tools": [ANTHROPIC]},
     {"messages": user(), "max_tokens": 3, "tool_choice": {"type": "tool", "name": "x"},
      "tools": [ANTHROPIC]},
     {"messages": user(), "max_tokens": 3, "thinking": {"type": "maybe"}}],
)  # fmt: skip
def test_bad_messages_get_anthropic_errors(serve: Open, fields: Any) -> None:
    response = serve(Script("x")).post("/v1/messages", json=fields)
    assert response.status_code == 400
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["message"].endswith(".")


def test_models_and_health(serve: Open) -> None:
    client = serve(Script("x"), model_name="org/name")
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "org/name"
    assert client.get("/v1/models/org/name").json() == card
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json()["status"] == "ok"
    for name in ("org/name", "name", "default"):
        asked = {"messages": user(), "model": name}
        assert client.post("/v1/chat/completions", json=asked).json()["model"] == "org/name"


def test_metrics(serve: Open) -> None:
    client = serve(Script("one two three four"))
    client.post("/v1/chat/completions", json={"messages": user()})
    client.post("/v1/chat/completions", json={"messages": 3})
    text = client.get("/metrics").text
    assert 'mlx_dgemma_requests_total{route="/v1/chat/completions",status="200"} 1' in text
    assert 'mlx_dgemma_requests_total{route="/v1/chat/completions",status="400"} 1' in text
    assert 'mlx_dgemma_replies_total{reason="stop"} 1' in text
    assert "mlx_dgemma_requests_admitted 0" in text
