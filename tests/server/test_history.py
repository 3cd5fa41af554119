"""Conversations as agents send them: mended, each repair with a warning, never refused."""

from typing import Any

import pytest

from mlx_dgemma.server.history import mend

from .conftest import Open, Script, tokenizer, user


def call(*ids: str | None, name: str = "look") -> dict[str, Any]:
    calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": "{}"}} for i in ids
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(identity: str | None, text: Any = "r", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": text, **more}


def order(messages: list[Any]) -> list[str]:
    return [f"{m['role']}:{m.get('tool_call_id') or m.get('content') or ''}" for m in messages]


@pytest.mark.parametrize("between", ["user", "developer", "system"])
def test_results_are_paired_by_id_wherever_they_stand(between: str) -> None:
    aside = {"role": between, "content": "hurry"}
    given = [*user("a"), call("1", "2"), result("2"), aside, result("1"), *user("b")]
    mended, warnings = mend(given)
    assert order(mended) == [
        "user:a", "assistant:", "tool:1", "tool:2", f"{between}:hurry", "user:b"
    ]  # fmt: skip
    assert warnings == ()


def test_results_come_in_the_order_of_their_calls() -> None:
    """The template names a result by its tool alone; agents send what is done first, first."""
    mended, _ = mend([*user(), call("1", "2", "3"), result("3"), result("1"), *user("b")])
    assert order(mended[2:5]) == ["tool:1", "tool:2", "tool:3"]
    numbers = call("x", "y")
    numbers["tool_calls"][0]["id"], numbers["tool_calls"][1]["id"] = 7, 8
    mended, warnings = mend([*user(), numbers, result("8"), result("7")])
    assert order(mended[2:]) == ["tool:7", "tool:8"]
    assert warnings == ()
    empty = [*user(), call("", ""), result("", "a"), result("", "b"), result("", "c")]
    assert [m.get("content") for m in mend(empty)[0][2:4]] == ["a", "b"]


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
    mended, _ = mend([*user("a"), {**result("9", "42"), "name": "goal"}])
    assert mended[1] == {"role": "user", "content": "The result of goal: 42"}


def test_a_result_without_an_id_answers_the_first_open_call() -> None:
    mended, warnings = mend([*user(), call("1", "2"), result(None), result(None)])
    assert [m.get("tool_call_id") for m in mended[2:]] == ["1", "2"]
    assert warnings == ()


def test_the_old_function_role_answers_by_name() -> None:
    mended, _ = mend([*user(), call(None), {"role": "function", "name": "look", "content": "r"}])
    assert (mended[2]["role"], mended[2]["name"]) == ("tool", "look")


def test_the_old_call_is_one() -> None:
    function = {"name": "look", "arguments": "{}"}
    old = {"role": "assistant", "content": None, "function_call": function}
    answered = {"role": "function", "name": "look", "content": "r"}
    mended, warnings = mend([*user(), old, answered])
    assert mended[1]["tool_calls"] == [{"type": "function", "function": function}]
    assert (mended[2]["role"], warnings) == ("tool", ())


def test_a_call_nobody_answered_gets_an_empty_result() -> None:
    mended, warnings = mend([*user("a"), call("1", "2"), result("1"), *user("b")])
    assert order(mended) == ["user:a", "assistant:", "tool:1", "tool:2", "user:b"]
    assert mended[3]["content"] == "(no result)"
    assert warnings == ("tool calls without a result: 1",)
    running = [*user("a"), call("1")]
    assert mend(running) == (running, ())


def test_a_result_nobody_asked_for_is_told_by_the_user() -> None:
    mended, warnings = mend([*user("a"), result("9", "42")])
    assert mended[1] == {"role": "user", "content": "The result of a tool call: 42"}
    assert "not in the conversation" in warnings[0]


def test_parts_that_cannot_be_read_become_placeholders() -> None:
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": "AAAA"}}
    text = {"type": "text", "text": "?"}
    mended, warnings = mend([{"role": "user", "content": [file, text, "bare"]}])
    head = {"type": "text", "text": "[file a.pdf: this model cannot read it]"}
    assert mended[0]["content"] == [head, text, {"type": "text", "text": "bare"}]
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
