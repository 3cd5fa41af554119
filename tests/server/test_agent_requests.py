"""What agents' dialects hold beside plain chat: other kinds of tools, items, blocks and names."""

import json
from typing import Any

import pytest

from mlx_dgemma.server.stored import StoredResponses

from .conftest import Open, Script, tokenizer, user

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
CALL = "<|tool_call>call:look{}<tool_call|>"


def events(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# Streams and cut calls


@pytest.mark.parametrize("include_usage", [False, True])
def test_every_chunk_has_a_choice_unless_usage_was_asked_for(
    serve: Open, include_usage: bool
) -> None:
    asked = {"messages": user(), "stream": True, "top_p": 0.5, "unknown": 1}
    if include_usage:
        asked["stream_options"] = {"include_usage": True}
    chunks = events(serve(Script("ok")).post(CHAT, json=asked).text)
    empty = [chunk for chunk in chunks if not chunk["choices"]]
    assert [chunk["usage"]["completion_tokens"] > 0 for chunk in empty] == [True] * include_usage
    (last,) = [c for c in chunks if c["choices"] and c["choices"][0]["finish_reason"]]
    assert len(last["x_warnings"]) == 2


CUT = 'I edit.<|tool_call>call:edit_file{path:<|"|>a.py<|"|>,text:<|"|>xyz<|"|>}<tool_call|>'
EDIT = {"type": "function", "function": {"name": "edit_file", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_anywhere_is_no_call(serve: Open, stream: bool) -> None:
    ids = tokenizer().encode(CUT, special=True)
    start = ids.index(tokenizer().ids["stc"]) + 2
    for limit in range(start, len(ids) - 2):
        asked = {"messages": user(), "max_tokens": limit, "tools": [EDIT], "stream": stream}
        answer = serve(Script(CUT)).post(CHAT, json=asked)
        if stream:
            chunks = events(answer.text)
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            text = "".join(delta.get("content") or "" for delta in deltas)
            calls = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
            reason, warnings = chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["x_warnings"]
        else:
            body = answer.json()
            message, reason = body["choices"][0]["message"], body["choices"][0]["finish_reason"]
            text, calls, warnings = (
                message["content"],
                message.get("tool_calls"),
                body["x_warnings"],
            )
        assert (text, calls or None, reason) == ("I edit.", None, "length"), limit
        assert warnings == ["the reply ended inside a tool call, which was left out"]


@pytest.mark.parametrize(("path", "reason"), [(RESPONSES, "incomplete"), (MESSAGES, "max_tokens")])
def test_a_cut_call_in_the_other_dialects(serve: Open, path: str, reason: str) -> None:
    limit = len(tokenizer().encode(CUT, special=True)) - 4
    asked = {"max_tokens": limit, "max_output_tokens": limit, "input": "a", "messages": user()}
    body = serve(Script(CUT)).post(path, json=asked).json()
    assert (body.get("status") or body["stop_reason"]) == reason
    kinds = [item["type"] for item in body.get("output") or body["content"]]
    assert kinds in (["message"], ["text"])


def test_code_in_an_answer_is_no_call(serve: Open) -> None:
    for text in (
        "```python\nedit_file(path=1)\n```",
        "edit_file()",
        "edit_file{}",
        "edit_file(){}",
    ):
        body = serve(Script(text)).post(CHAT, json={"messages": user(), "tools": [EDIT]}).json()
        assert body["choices"][0]["message"] == {"role": "assistant", "content": text}


# Responses


def test_codex_can_connect(serve: Open, conversations: list[Any]) -> None:
    """The tools and items of Codex' requests."""
    tools = [
        LOOK,
        {"type": "web_search"},
        {"type": "image_generation"},
        {"type": "tool_search"},
        {"type": "mcp", "server_label": "x"},
        {"type": "local_shell"},
        {"type": "custom", "name": "apply_patch", "description": "Edits files.",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
        {"type": "namespace", "name": "mcp__files", "tools": [{**LOOK, "name": "read"}]},
    ]  # fmt: skip
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "d"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xx"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}], "content": None},
        {"type": "local_shell_call", "call_id": "1", "status": "completed",
         "action": {"type": "exec", "command": ["ls"], "env": {}}},
        {"type": "local_shell_call_output", "call_id": "1", "output": "a.py"},
        {"type": "custom_tool_call", "call_id": "2", "name": "apply_patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "done"},
        {"type": "function_call", "call_id": "3", "name": "read", "namespace": "mcp__files",
         "arguments": "{}"},
        {"type": "function_call_output", "call_id": "3",
         "output": [{"type": "input_text", "text": "text"}]},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "compaction", "encrypted_content": "xx"},
        {"type": "item_reference", "id": "msg_gone"},
        {"type": "additional_tools", "tools": [{**LOOK, "name": "more"}]},
    ]  # fmt: skip
    script = Script("ok")
    asked = {
        "input": items,
        "tools": tools,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
    }
    body = serve(script).post(RESPONSES, json=asked).json()
    assert body["status"] == "completed", body
    names = [tool["function"]["name"] for tool in script.seen[0]["tools"]]
    assert names == ["look", "local_shell", "apply_patch", "mcp__files__read", "more"]
    said = " ".join(body["x_warnings"])
    for word in ("web_search", "image_generation", "tool_search", "mcp", "compaction", "grammar"):
        assert word in said
    calls = [m["tool_calls"][0] for m in conversations[0] if m.get("tool_calls")]
    assert [c["function"]["name"] for c in calls] == [
        "local_shell",
        "apply_patch",
        "mcp__files__read",
    ]
    assert calls[0]["function"]["arguments"] == {"command": ["ls"]}


@pytest.mark.parametrize(
    ("tool", "reply", "item"),
    [
        ({"type": "custom", "name": "sql"},
         'call:sql{input:<|"|>select 1<|"|>}',
         {"type": "custom_tool_call", "name": "sql", "input": "select 1"}),
        ({"type": "local_shell"}, 'call:local_shell{command:[<|"|>ls<|"|>]}',
         {"type": "local_shell_call", "action": {"type": "exec", "env": {}, "command": ["ls"]}}),
        ({"type": "shell"}, 'call:shell{commands:[<|"|>ls -a<|"|>]}',
         {"type": "shell_call", "action": {"commands": ["ls -a"]}}),
        ({"type": "namespace", "name": "files", "tools": [LOOK]}, "call:files__look{}",
         {"type": "function_call", "name": "look", "namespace": "files", "arguments": "{}"}),
    ],
)  # fmt: skip
def test_calls_come_back_as_what_was_declared(
    serve: Open, tool: dict[str, Any], reply: str, item: dict[str, Any]
) -> None:
    asked = {"input": "a", "tools": [tool]}
    script = Script(f"<|tool_call>{reply}<tool_call|>")
    (whole,) = serve(script).post(RESPONSES, json=asked).json()["output"]
    assert {name: whole[name] for name in item} == item
    assert whole["call_id"].startswith("call_")
    stream = events(serve(script).post(RESPONSES, json={**asked, "stream": True}).text)
    (done,) = [e["item"] for e in stream if e["type"] == "response.output_item.done"]
    assert {name: done[name] for name in item} == item
    text = item.get("input", item.get("arguments"))
    deltas = [e["delta"] for e in stream if e["type"].endswith(("input.delta", "arguments.delta"))]
    assert deltas == ([] if text is None else [text])


def test_a_custom_tool_in_chat_completions(serve: Open) -> None:
    tool = {"type": "custom", "custom": {"name": "sql", "description": "Asks."}}
    script = Script('<|tool_call>call:sql{input:<|"|>select 1<|"|>}<tool_call|>')
    asked = {"messages": user(), "tools": [tool, {"type": "web_search"}]}
    body = serve(script).post(CHAT, json=asked).json()
    (made,) = body["choices"][0]["message"]["tool_calls"]
    assert (made["type"], made["custom"]) == ("custom", {"name": "sql", "input": "select 1"})
    assert "web_search" in body["x_warnings"][0]


def test_responses_are_continued_and_quoted(serve: Open, conversations: list[Any]) -> None:
    script = Script("one", "two", CALL, "four")
    client = serve(script)
    first = client.post(RESPONSES, json={"input": "a", "instructions": "Only now."}).json()
    assert first["store"] is True
    asked = {"input": "b", "previous_response_id": first["id"], "tools": [LOOK]}
    second = client.post(RESPONSES, json=asked).json()
    assert [m["role"] for m in conversations[1]] == ["user", "assistant", "user"]
    third = client.post(RESPONSES, json={**asked, "previous_response_id": second["id"]}).json()
    output = {
        "type": "function_call_output",
        "call_id": third["output"][0]["call_id"],
        "output": "x",
    }
    # As the AI SDK does: items of the last step by their ids.
    reference = {"type": "item_reference", "id": third["output"][0]["id"]}
    short = {"id": reference["id"]}  # what the dialect allows, too
    items = [user("b")[0], reference, output]
    client.post(RESPONSES, json={"input": [user("b")[0], short, output]})
    assert [m["role"] for m in conversations[3]] == ["user", "assistant", "tool"]
    fourth = client.post(RESPONSES, json={"input": items}).json()
    assert fourth["output"][0]["content"][0]["text"] == "four"
    assert [m["role"] for m in conversations[4]] == ["user", "assistant", "tool"]
    assert fourth["x_warnings"] == []


def test_a_response_that_is_not_stored_cannot_be_continued(serve: Open) -> None:
    client = serve(Script("one"))
    first = client.post(RESPONSES, json={"input": "a", "store": False}).json()
    asked = {"input": "b", "previous_response_id": first["id"]}
    answer = client.post(RESPONSES, json=asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "previous_response_not_found"


def test_the_store_forgets_by_number_size_and_age(monkeypatch: pytest.MonkeyPatch) -> None:
    def response(name: str, length: int = 100) -> dict[str, Any]:
        return {"id": name, "output": [{"id": f"m{name}", "text": "x" * length}]}

    store = StoredResponses(most=2, max_bytes=10_000, seconds=60)
    for name in "abc":
        store.put(response(name), (), [])
    assert [store.get(name) is None for name in "abc"] == [True, False, False]
    assert "ma" not in store.items()
    assert store.items()["mc"]["id"] == "mc"
    store.put(response("big", 9_900), (), [])
    assert store.get("c") is None
    store.put(response("too big", 11_000), (), [])
    assert store.get("too big") is None
    assert store.get("big") is not None
    assert (store.delete("big"), store.delete("big")) == (True, False)
    store.put(response("later", 9_900), (), [])  # there is room again
    import time

    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert store.get("later") is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_read_listed_and_deleted(serve: Open, stream: bool) -> None:
    client = serve(Script("one", "two"))
    items = [{"type": "message", "role": "user", "content": "a"}, *user("b")]
    first = client.post(RESPONSES, json={"input": items, "stream": stream})
    one = events(first.text)[-1]["response"] if stream else first.json()
    two = client.post(RESPONSES, json={"input": "c", "previous_response_id": one["id"]}).json()
    at = f"{RESPONSES}/{two['id']}"
    assert client.get(at).json() == two
    listed = client.get(f"{at}/input_items?order=asc").json()
    texts = [item["content"][0]["text"] for item in listed["data"]]
    assert texts == ["a", "b", "one", "c"]
    assert listed["has_more"] is False
    page = client.get(f"{at}/input_items?limit=1&after={listed['last_id']}").json()
    assert [item["content"][0]["text"] for item in page["data"]] == ["one"]
    assert page["has_more"] is True
    deleted = client.delete(f"{RESPONSES}/{one['id']}").json()
    assert deleted == {"id": one["id"], "object": "response", "deleted": True}
    assert client.get(f"{RESPONSES}/{one['id']}").status_code == 404
    go_on = {"input": "d", "previous_response_id": two["id"]}
    assert client.post(RESPONSES, json=go_on).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "resp_none", 404),
        ("DELETE", "resp_none", 404),
        ("GET", "resp_none/input_items", 404),
        ("POST", "resp_none/cancel", 404),
        ("GET", "{}?stream=true", 400),
        ("GET", "{}/input_items?limit=0", 400),
        ("GET", "{}/input_items?limit=x", 400),
        ("GET", "{}/input_items?after=x", 400),
        ("PUT", "{}", 405),
    ],
)
def test_what_cannot_be_read_of_responses(serve: Open, method: str, path: str, status: int) -> None:
    client = serve(Script("one"))
    kept = client.post(RESPONSES, json={"input": "a"}).json()["id"]
    answer = client.request(method, f"{RESPONSES}/{path.format(kept)}")
    assert answer.status_code == status
    assert answer.json()["error"]["message"].endswith(".")


def test_what_only_a_provider_keeps(serve: Open) -> None:
    client = serve(Script("one"))
    for name, value in (("conversation", "c"), ("prompt", {"id": "p"}), ("background", True)):
        answer = client.post(RESPONSES, json={"input": "a", name: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name
    body = client.post(RESPONSES, json={"input": "a", "background": False, "prompt": None}).json()
    assert body["x_warnings"] == []


# Anthropic


SERVER_TOOLS = ("web_search_20250305", "web_fetch_20250910", "code_execution_20250825",
                "computer_20250124", "memory_20250818", "tool_search_tool_regex_20251119",
                "mcp_toolset")  # fmt: skip
BLOCKS = [
    {"type": "document",
     "source": {"type": "base64", "media_type": "application/pdf", "data": "A"}},
    {"type": "document", "title": "T", "source": {"type": "text", "data": "inside"}},
    {"type": "search_result", "title": "S", "source": "u",
     "content": [{"type": "text", "text": "found"}]},
    {"type": "tool_reference", "tool_name": "look"},
    {"type": "container_upload", "file_id": "f"},
    {"type": "image", "source": {"type": "file", "file_id": "f"}},
]  # fmt: skip
SERVER_BLOCKS = [
    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
    {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
    {"type": "code_execution_tool_result", "tool_use_id": "s", "content": {"stdout": ""}},
    {"type": "mcp_tool_use", "id": "m", "name": "x", "server_name": "y", "input": {}},
    {"type": "compaction", "content": "before"},
]


def test_server_tools_and_blocks_leave_a_conversation_usable(
    serve: Open, conversations: list[Any]
) -> None:
    script = Script("ok")
    conversation = [
        {"role": "user", "content": [*BLOCKS, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [
            *SERVER_BLOCKS, {"type": "tool_use", "id": "1", "name": "look", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": BLOCKS, "is_error": True}]},
    ]  # fmt: skip
    tools = [{"type": kind, "name": kind.rpartition("_")[0]} for kind in SERVER_TOOLS]
    asked = {"messages": conversation, "max_tokens": 9, "tools": tools}
    body = serve(script).post(MESSAGES, json=asked).json()
    assert body["content"] == [{"type": "text", "text": "ok"}], body
    said = "\n".join(body["x_warnings"])
    for kind in (*SERVER_TOOLS, *(block["type"] for block in SERVER_BLOCKS)):
        assert kind in said
    texts = [part["text"] for part in conversations[0][0]["content"]]
    assert texts[1] == "T\ninside"
    assert texts[2].endswith("S: this model cannot read it]\nfound")
    result = conversations[0][2]["content"]
    assert result.startswith("Error: ")
    assert "inside" in result


def test_tools_that_the_client_runs_are_declared(serve: Open) -> None:
    script = Script("ok")
    tools = [{"type": "bash_20250124", "name": "bash"},
             {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"}]  # fmt: skip
    asked = {"messages": user(), "max_tokens": 9, "tools": tools}
    assert serve(script).post(MESSAGES, json=asked).json()["x_warnings"] == []
    declared = [tool["function"] for tool in script.seen[0]["tools"]]
    assert [function["name"] for function in declared] == ["bash", "str_replace_based_edit_tool"]
    assert "command" in declared[1]["parameters"]["properties"]


# Names, limits and small values


def test_a_refused_host_gets_json_and_a_line_in_the_log(
    serve: Open, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(Script("ok"))
    for path in ("/v1/models", "/v1/messages"):
        answer = client.get(path, headers={"host": "host.docker.internal:8080"})
        assert answer.status_code == 400
        assert "--allowed-host" in answer.json()["error"]["message"]
    assert "host.docker.internal" in caplog.text
    client = serve(Script("ok"), allowed_hosts=("host.docker.internal",))
    for host in ("host.docker.internal:8080", "HOST.docker.internal", "localhost", "[::1]:8080"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200, host


def test_aliases_and_any_model(serve: Open) -> None:
    asked = {"messages": user(), "max_tokens": 9, "model": "claude-haiku-4-5"}
    assert serve(Script("ok")).post(MESSAGES, json=asked).status_code == 404
    client = serve(Script("ok"), aliases=("claude-haiku-4-5",))
    assert client.post(MESSAGES, json=asked).status_code == 200
    assert client.get("/v1/models/claude-haiku-4-5").json()["id"] == "claude-haiku-4-5"
    assert [card["id"] for card in client.get("/v1/models").json()["data"]][1:] == [
        "claude-haiku-4-5"
    ]
    assert client.post(MESSAGES, json={**asked, "model": "x"}).status_code == 404
    assert serve(Script("ok"), any_model=True).post(MESSAGES, json=asked).status_code == 200


def test_a_model_card_says_what_clients_look_for(serve: Open) -> None:
    client = serve(Script("ok"), max_prompt_tokens=1000)
    (card,) = client.get("/v1//models").json()["data"]
    assert card["context_length"] == card["max_model_len"] == 1000
    assert (card["type"], card["object"]) == ("model", "model")
    assert card["created_at"].endswith("Z")
    assert card["display_name"]


@pytest.mark.parametrize("words", [30, 100], ids=["encoded", "before it is encoded"])
def test_a_prompt_that_is_too_long_is_said_in_the_clients_words(serve: Open, words: int) -> None:
    client = serve(Script("ok"), max_prompt_tokens=20)
    long = user("word " * words)
    error = client.post(CHAT, json={"messages": long}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 20 tokens" in error["message"]
    answer = client.post(MESSAGES, json={"messages": long, "max_tokens": 9})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["message"].startswith("prompt is too long: ")
    error = client.post(RESPONSES, json={"input": "word " * words}).json()["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": -1}, {"max_completion_tokens": -1}, {"seed": -1}, {"stop": ""}, {"stop": [""]},
     {"reasoning_effort": ""}, {"temperature": None, "tools": [], "tool_choice": None}],
)  # fmt: skip
def test_values_that_ask_for_nothing(serve: Open, fields: dict[str, Any]) -> None:
    script = Script("ok")
    body = serve(script).post(CHAT, json={"messages": user(), **fields}).json()
    assert body["choices"][0]["message"]["content"] == "ok"
    seen = script.seen[0]
    assert (seen["enable_thinking"], seen["stop"], seen["max_tokens"]) == (False, [], 8192)
    assert seen["seed"] >= 0
