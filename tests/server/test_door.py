"""Who gets in and how much: keys, hosts, sizes, the queue, cancellation, any JSON at all."""

import contextlib
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.decoding.events import Finish
from mlx_dgemma.errors import InputError
from mlx_dgemma.server.settings import ServerSettings

from .conftest import Open, Script, user

URL = "/v1/chat/completions"


def test_a_key_is_checked_when_there_is_one(serve: Open) -> None:
    client = serve(Script("ok"), api_key="secret")
    body = {"messages": user()}
    assert client.post(URL, json=body).status_code == 401
    assert client.get("/v1/models").status_code == 401
    assert client.get("/metrics").status_code == 401
    assert client.get("/health").status_code == 200
    for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
        assert client.post(URL, json=body, headers=headers).status_code == 200
    wrong = client.post(URL, json=body, headers={"Authorization": b"Bearer wrong\xe9"})
    assert wrong.json()["error"]["code"] == "invalid_api_key"
    anthropic = client.post("/v1/messages", json=body).json()
    assert anthropic["error"]["type"] == "authentication_error"


def test_other_machines_need_a_key() -> None:
    with pytest.raises(InputError, match="set an API key"):
        ServerSettings(host="0.0.0.0")
    assert ServerSettings(host="0.0.0.0", api_key="k").loopback is False
    assert ServerSettings(host="127.0.0.2").loopback is True
    assert "secret" not in repr(ServerSettings(api_key="secret"))


def test_pages_of_other_sites_stay_out(serve: Open) -> None:
    client = serve(Script("ok"))
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400
    plain = client.post(URL, content='{"messages": []}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options(URL, headers=origin).headers
    friendly = serve(Script("ok"), cors_origins=("https://good.example",))
    origin["Origin"] = "https://good.example"
    assert friendly.options(URL, headers=origin).headers["access-control-allow-origin"]


def test_bodies_are_limited_and_must_be_json(serve: Open) -> None:
    client = serve(Script("ok"), max_body_bytes=200)
    json_type = {"Content-Type": "application/json"}
    big = client.post(URL, json={"messages": user("x" * 300)})
    assert (big.status_code, big.json()["error"]["type"]) == (413, "request_too_large")
    for content in ("{", "[1]", "NaN", '{"temperature": NaN}', "\xff", "[" * 150):
        response = client.post(URL, content=content.encode("latin-1"), headers=json_type)
        assert response.status_code == 400, content
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/nothing").json()["error"]["type"] == "not_found_error"


def test_a_full_queue_answers_429(serve: Open) -> None:
    script = Script("one two three")
    may_end, answer = threading.Event(), script._answer

    def held(*args: Any) -> None:
        may_end.wait(timeout=60)
        answer(*args)

    script._answer = held  # type: ignore[method-assign]
    client = serve(script, max_concurrent=1, max_waiting=1)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(client.post, URL, json={"messages": user()}) for _ in range(4)]
        ended = as_completed(answers)
        refused = [next(ended).result() for _ in range(2)]
        may_end.set()
        assert [answer.result().status_code for answer in ended] == [200, 200]
    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
    assert client.post(URL, json={"messages": user(), "stream": True}).status_code == 200


def test_requests_take_a_place_each(serve: Open) -> None:
    """max_concurrent are on the model at a time, and never more."""
    script = Script("one two three", pause=0.02)
    running, most, lock = 0, 0, threading.Lock()
    pair = threading.Barrier(2)  # each waits for another: a server that runs one breaks it
    answer = script._answer

    def counted(prompt: Any, reply: Any, deliver: Callable[[Any], None], options: Any) -> None:
        def told(item: Any) -> None:
            nonlocal running
            if isinstance(item, Finish):  # before the server hears of it and gives the place away
                with lock:
                    running -= 1
            deliver(item)

        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with contextlib.suppress(threading.BrokenBarrierError):
            pair.wait(timeout=60)
        answer(prompt, reply, told, options)

    script._answer = counted  # type: ignore[method-assign]
    client = serve(script, max_concurrent=2)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(client.post, URL, json={"messages": user()}) for _ in range(6)]
        assert {answer.result().status_code for answer in answers} == {200}
    assert (most, running, pair.broken) == (2, 0, False)


def test_the_time_limit_ends_a_reply_with_what_it_has(serve: Open) -> None:
    client = serve(Script("one two three " * 40, pause=0.05), max_seconds=0.5)
    body = client.post(URL, json={"messages": user()}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert "the server's time limit ended this reply" in body["x_warnings"]


def test_the_log_holds_no_prompts_unless_asked(
    serve: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mlx_dgemma.server")
    serve(Script("REPLY")).post(URL, json={"messages": user("PRIVATE")})
    (entry,) = [json.loads(record.message) for record in caplog.records]
    assert (entry["route"], entry["status"]) == (URL, 200)
    assert "PRIVATE" not in caplog.text
    assert "REPLY" not in caplog.text
    serve(Script("x"), log_prompts=True).post(URL, json={"messages": user("PRIVATE")})
    assert "PRIVATE" in caplog.text


def test_shutdown_closes_the_runtime(serve: Open) -> None:
    script = Script("x")
    client = serve(script)
    client.__exit__(None, None, None)
    assert script.closed
    client.__enter__()


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
kinds = st.sampled_from(
    ["text", "input_text", "image_url", "tool_use", "tool_result", "thinking", "function",
     "function_call", "function_call_output", "reasoning", "message", "json_schema", "auto"]
)  # fmt: skip
parts = st.fixed_dictionaries({"type": kinds, "text": leaves})
functions = st.fixed_dictionaries({"name": leaves, "parameters": values})
objects = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "x"]),
        "type": st.one_of(kinds, leaves),
        "content": st.one_of(values, st.lists(parts, max_size=2)),
        "text": leaves,
        "name": leaves,
        "id": leaves,
        "call_id": leaves,
        "output": values,
        "arguments": values,
        "input": values,
        "function": st.one_of(values, functions),
        "tool_calls": values,
        "tool_call_id": leaves,
    },
)  # fmt: skip
FIELDS = (
    *("model", "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "seed", "stop"),
    *("max_output_tokens", "stop_sequences", "stream", "stream_options", "tool_choice", "echo"),
    *("response_format", "logprobs", "prompt", "suffix", "text", "system", "instructions"),
    *("thinking", "reasoning", "reasoning_effort", "canvas_length", "sampler", "entropy_bound"),
    *("metadata", "parallel_tool_calls", "chat_template_kwargs"),
)
bodies = st.fixed_dictionaries(
    {"messages": st.one_of(st.lists(objects, max_size=3), values),
     "input": st.one_of(st.lists(objects, max_size=3), values)},
    optional={"tools": st.one_of(st.lists(objects, max_size=2), values),
              **dict.fromkeys(FIELDS, values)},
)  # fmt: skip


@settings(max_examples=120)
@given(path=st.sampled_from([URL, "/v1/completions", "/v1/responses", "/v1/messages"]), body=bodies)
def test_no_body_breaks_the_server(fuzzed: Any, path: str, body: Any) -> None:
    response = fuzzed.post(path, json=body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@pytest.fixture
def fuzzed(serve: Open) -> Any:
    return serve(Script("a reply"))


def test_a_reply_is_not_kept_waiting_by_a_dead_one(serve: Open) -> None:
    """An error in one request leaves its place to the next."""
    client = serve(Script(RuntimeError("x"), RuntimeError("y"), "ok"), max_concurrent=1)
    codes = [client.post(URL, json={"messages": user()}).status_code for _ in range(3)]
    assert codes == [500, 500, 200]
