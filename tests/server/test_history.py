"""Conversations as agents send them: repaired, each repair with a warning, never refused."""

from typing import Any

import pytest

from mlx_dgemma.server.history import repair

from .conftest import Open, Script, tokenizer, user


def call(*ids: str | None, name: str = "look") -> dict[str, Any]:
    calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": "{}"}} for i in ids
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(identity: str | None, text: Any = "r", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": text, **more}


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def order(messages: list[Any]) -> list[str]:
    return [f"{m['role']}:{m.get('tool_call_id') or m.get('content') or ''}" for m in messages]


@pytest.mark.parametrize("between", ["user", "developer", "system"])
def test_results_are_paired_by_id_wherever_they_stand(between: str) -> None:
    aside = {"role": between, "content": "hurry"}
    given = [*user("a"), call("1", "2"), result("2"), aside, result("1"), *user("b")]
    repaired, warnings = repair(given)
    assert order(repaired) == [
        "user:a", "assistant:", "tool:1", "tool:2", f"{between}:hurry", "user:b"
    ]  # fmt: skip
    assert warnings == ()


def test_results_come_in_the_order_of_their_calls() -> None:
    """The template names a result by its tool alone; agents send what is done first, first."""
    repaired, _ = repair([*user(), call("1", "2", "3"), result("3"), result("1"), *user("b")])
    assert order(repaired[2:5]) == ["tool:1", "tool:2", "tool:3"]
    numbers = call("x", "y")
    numbers["tool_calls"][0]["id"], numbers["tool_calls"][1]["id"] = 7, 8
    repaired, warnings = repair([*user(), numbers, result("8"), result("7")])
    assert order(repaired[2:]) == ["tool:7", "tool:8"]
    assert warnings == ()
    empty = [*user(), call("", ""), result("", "a"), result("", "b"), result("", "c")]
    assert [m.get("content") for m in repair(empty)[0][2:4]] == ["a", "b"]


@pytest.mark.parametrize(
    "part", [{"type": "input_audio", "input_audio": {}}, {"type": "video_url", "video_url": {}}]
)
def test_sound_is_refused_in_the_newest_question_only(serve: Open, part: dict[str, Any]) -> None:
    client = serve(Script("fine"))

    def ask(messages: list[Any]) -> Any:
        return client.post("/v1/chat/completions", json={"messages": messages})

    heard = {"role": "user", "content": [part, {"type": "text", "text": "?"}]}
    assert ask([heard]).status_code == 400
    looked = [*user(), call("1"), {**result("1"), "content": [part]}]
    for messages in ([heard, *user("go on")], looked):
        answer = ask(messages)
        assert answer.status_code == 200, answer.text
        assert part["type"] in answer.json()["x_warnings"][0]


def test_a_result_nobody_asked_for_keeps_its_name() -> None:
    repaired, _ = repair([*user("a"), {**result("9", "42"), "name": "goal"}])
    assert repaired[1] == {"role": "user", "content": "The result of goal: 42"}


def test_a_result_without_an_id_answers_the_first_open_call() -> None:
    repaired, warnings = repair([*user(), call("1", "2"), result(None), result(None)])
    assert [m.get("tool_call_id") for m in repaired[2:]] == ["1", "2"]
    assert warnings == ()


def test_the_old_function_role_answers_by_name() -> None:
    repaired, _ = repair(
        [*user(), call(None), {"role": "function", "name": "look", "content": "r"}]
    )
    assert (repaired[2]["role"], repaired[2]["name"]) == ("tool", "look")


def test_the_old_call_is_one() -> None:
    function = {"name": "look", "arguments": "{}"}
    old = {"role": "assistant", "content": None, "function_call": function}
    answered = {"role": "function", "name": "look", "content": "r"}
    repaired, warnings = repair([*user(), old, answered])
    assert repaired[1]["tool_calls"] == [{"type": "function", "function": function}]
    assert (repaired[2]["role"], warnings) == ("tool", ())


def test_a_call_nobody_answered_gets_an_empty_result() -> None:
    repaired, warnings = repair([*user("a"), call("1", "2"), result("1"), *user("b")])
    assert order(repaired) == ["user:a", "assistant:", "tool:1", "tool:2", "user:b"]
    assert repaired[3]["content"] == "(no result)"
    assert warnings == ("tool calls without a result: 1",)
    running = [*user("a"), call("1")]
    assert repair(running) == (running, ())


def test_a_result_nobody_asked_for_is_told_by_the_user() -> None:
    repaired, warnings = repair([*user("a"), result("9", "42")])
    assert repaired[1] == {"role": "user", "content": "The result of a tool call: 42"}
    assert "not in the conversation" in warnings[0]


def test_parts_that_cannot_be_read_become_placeholders() -> None:
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": "AAAA"}}
    text = {"type": "text", "text": "?"}
    repaired, warnings = repair([{"role": "user", "content": [file, text, "bare"]}])
    head = {"type": "text", "text": "[file a.pdf: this model cannot read it]"}
    assert repaired[0]["content"] == [head, text, {"type": "text", "text": "bare"}]
    assert warnings == ("messages[0].content[0] of type file cannot be read",)


ODD: list[tuple[str, list[Any]]] = [
    ("arguments that are no JSON", [
        *user(), {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}]},
        result("1")]),
    ("arguments null", [
        *user(), {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": None}}]},
        result("1")]),
    ("arguments that are a list", [
        *user(), {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": [1]}}]},
        result("1")]),
    ("a call without a function", [
        *user(), {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]},
        result("1")]),
    ("a call without a name", [*user(), call("1", name=""), result("1")]),
    ("a call that is text", [*user(), {"role": "assistant", "tool_calls": ["look()"]}]),
    ("calls that are an object", [*user(), {"role": "assistant", "tool_calls": {"id": "1"}}]),
    ("an assistant's object", [*user(), {"role": "assistant", "content": {"a": 1}}, *user()]),
    ("null result", [*user(), call("1"), result("1", None)]),
    ("result object", [*user(), call("1"), result("1", {"a": [1]})]),
    ("empty strings", [{"role": "system", "content": ""}, *user(""), call(""), result("", "")]),
    ("number as id", [*user(), {**call("1")}, {**result("1"), "tool_call_id": 1}]),
    ("null user", [{"role": "user", "content": None}, *user("x")]),
    ("empty assistant", [*user(), {"role": "assistant", "content": ""}, *user()]),
    ("no content at all", [*user(), {"role": "assistant"}, *user()]),
    ("ends with the assistant", [*user(), {"role": "assistant", "content": "So"}]),
    ("custom call", [
        *user(), {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "custom", "custom": {"name": "sql", "input": "select 1"}}]},
        result("1")]),
    ("image of the assistant", [
        *user(),
        {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        *user()]),
    ("reasoning part", [
        *user(), {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}]},
        *user()]),
    ("reasoning that is a list", [
        *user(), {"role": "assistant", "content": "x", "reasoning_content": [{"text": "t"}]},
        *user()]),
    ("text null", [*user([{"type": "text", "text": None}])]),
    ("old text that is a number", [*user([{"type": "text", "text": 3}]), *user()]),
    ("old part without a type", [*user([{"a": 1}, None]), *user()]),
]  # fmt: skip


@pytest.mark.parametrize(("messages"), [m for _, m in ODD], ids=[name for name, _ in ODD])
def test_one_odd_message_does_not_end_a_conversation(serve: Open, messages: list[Any]) -> None:
    answer = serve(Script("fine")).post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "fine"


def test_what_the_model_reads_of_broken_arguments(serve: Open) -> None:
    script = Script("fine")
    client = serve(script)
    assert client.post("/v1/chat/completions", json={"messages": ODD[0][1]}).status_code == 200
    from mlx_dgemma.generate import encode_prompt

    rendered = tokenizer().decode(encode_prompt(tokenizer(), script.seen[0]["prompt"]))
    assert 'call:f{{"a": }<tool_call|>' in rendered


BLOCKS: list[Any] = [
    3, None, "bare", {}, {"type": 3}, {"type": "text", "text": 3}, {"type": "text"},
    {"type": "image"}, {"type": "image", "source": {}}, {"type": "image", "source": 3},
    {"type": "image", "source": {"type": "base64", "data": 3}},
    {"type": "document", "source": {"type": "content", "content": [3]}},
]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_an_odd_old_block_does_not_end_an_anthropic_conversation(serve: Open, block: Any) -> None:
    call = {"type": "tool_use", "id": 7, "name": "look", "input": None}
    thought = {"type": "thinking", "thinking": 3}
    result = {"type": "tool_result", "tool_use_id": 7, "content": [block]}
    old = [
        {"role": "user", "content": [block]},
        {"role": "assistant", "content": [thought, block, call]},
        {"role": "user", "content": [result]},
    ]
    client = serve(Script("fine"))

    def ask(messages: list[Any]) -> Any:
        return client.post("/v1/messages", json={"messages": messages, "max_tokens": 9})

    for messages in ([*old, *user("and?")], [*user(), *old[1:]]):
        answer = ask(messages)
        assert (answer.status_code, answer.json()["content"][0]["text"]) == (200, "fine")
    if block not in ("bare", {"type": "text"}):
        refused = ask([{"role": "user", "content": [block]}])
        assert (refused.status_code, refused.json()["error"]["message"][-1]) == (400, ".")


def test_what_the_model_reads_of_odd_results(serve: Open, conversations: list[Any]) -> None:
    client = serve(Script("fine"))
    for content, read in (({"a": [1]}, '{"a": [1]}'), ([3, "x", {"b": 1}], '3\nx\n{"b": 1}')):
        messages = [
            *user(),
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "u1", "name": "look", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "u1", "content": content}]},
        ]  # fmt: skip
        answer = client.post("/v1/messages", json={"messages": messages, "max_tokens": 9})
        assert answer.status_code == 200, answer.text
        assert conversations[-1][-1]["role"] == "tool"
        assert text_of(conversations[-1][-1]["content"]) == read


RESULT: dict[str, Any] = {"type": "function_call_output", "call_id": 5, "output": "x"}
ITEMS: list[list[Any]] = [
    [{"type": "function_call", "call_id": 5, "name": 5, "arguments": "{}"}, RESULT],
    [{"type": "custom_tool_call", "call_id": 5, "name": None, "input": 3}, RESULT],
    [{**RESULT, "output": [{"type": "input_text", "text": None}]}],
    [{**RESULT, "output": [{"type": "input_text", "text": 3}, {"type": 3}]}],
    [{"role": "assistant", "content": 3}],
    [{"role": "assistant", "content": None}],
    [{"role": "assistant", "content": [{"type": "output_text", "text": None}, None]}],
]


@pytest.mark.parametrize("items", ITEMS, ids=str)
def test_an_odd_item_does_not_end_a_responses_conversation(serve: Open, items: Any) -> None:
    asked = {"input": [*user(), *items, *user("and?")]}
    answer = serve(Script("fine")).post("/v1/responses", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][-1]["content"][0]["text"] == "fine"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"input": [*user(), {}]}, "input[1].role"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "mcp"}, {}]}, "tools[1].name"),
        ("/v1/responses", {"input": "x", "tools": [{"name": "f", "parameters": 3}]},
         "tools[0].parameters"),
        ("/v1/messages", {"messages": user(), "max_tokens": 9, "tools": [{"input_schema": {}}]},
         "tools[0].name"),
        ("/v1/messages", {"messages": user(), "max_tokens": 9,
                          "tools": [{"name": "f", "input_schema": []}]}, "tools[0].input_schema"),
        ("/v1/chat/completions", {"messages": user(),
                                  "response_format": {"type": "json_schema"}},
         "response_format.json_schema.schema"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_of_its_own_dialect(
    serve: Open, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = serve(Script("fine")).post(path, json=fields)
    assert (answer.status_code, answer.json()["error"]["message"].split()[0]) == (400, param)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/chat/completions", "it is /v1/chat/completions, so end the client's base URL in /v1."),
        ("/models", "it is /v1/models, so end the client's base URL in /v1."),
        ("/v1/v1/messages", "leave /v1 out of the client's base URL."),
        ("/v1/embeddings", "/v1/embeddings does not exist."),
    ],
)
def test_a_wrong_base_url_is_explained(serve: Open, path: str, advice: str) -> None:
    answer = serve(Script("fine")).post(path, json={})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith(advice)
