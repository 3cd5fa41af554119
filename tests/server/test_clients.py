"""The official clients, unmodified, over a real socket: scripted replies, then the demo model."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from mlx_dgemma.demo.tasks.tools import DECLARATIONS
from mlx_dgemma.runtime import Runtime
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.connections import Server, configure
from mlx_dgemma.server.settings import ServerSettings

from .conftest import Script, user

CALL = '<|tool_call>call:look{q:<|"|>x<|"|>}<tool_call|>'
REPLY = f"<|channel>thought\nhm\n<channel|>Yes, of course.{CALL}"
FLAT: Any = {"type": "function", "name": "look", "description": "d", "parameters": {}}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ANTHROPIC: Any = {"name": "look", "input_schema": {"type": "object"}}


@contextmanager
def running(runtime: Any, **settings: Any) -> Iterator[str]:
    """The address of a server on a free loopback port."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = create_app(runtime, ServerSettings(**settings))
    server = Server(configure(app), app.state.stop)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def settled(url: str) -> None:
    """Waits until requests whose clients left are gone as well."""
    for _ in range(300):
        if "mlx_dgemma_requests_admitted 0" in httpx2.get(f"{url}/metrics").text:
            return
        time.sleep(0.1)
    raise AssertionError("requests are left over")


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[openai.OpenAI, anthropic.Anthropic]]]:
    opened = []

    def start(script: Script, **settings: Any) -> tuple[openai.OpenAI, anthropic.Anthropic]:
        context = running(script, prefix_cache_bytes=0, **settings)
        url = context.__enter__()
        opened.append(context)
        return (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0),
            anthropic.Anthropic(base_url=url, api_key="none", max_retries=0),
        )

    yield start
    for context in opened:
        context.__exit__(None, None, None)


def test_openai_chat(scripted: Any) -> None:
    client, _ = scripted(Script(REPLY))
    assert client.models.list().data[0].id == "diffusiongemma"
    whole = client.chat.completions.create(model="default", messages=user(), tools=[TOOL])
    message = whole.choices[0].message
    assert (message.content, message.reasoning) == ("Yes, of course.", "hm")
    assert message.tool_calls[0].function.arguments == '{"q": "x"}'
    text, names, usage = "", [], None
    for chunk in client.chat.completions.create(
        model="default", messages=user(), tools=[TOOL], stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            names += [call.function.name for call in choice.delta.tool_calls or []]
    assert (text, names) == ("Yes, of course.", ["look"])
    assert usage == whole.usage


def test_openai_stream_helper_rebuilds_the_reply(scripted: Any) -> None:
    client, _ = scripted(Script(REPLY, block=2))
    with client.chat.completions.stream(model="default", messages=user(), tools=[TOOL]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Yes, of course."
    assert final.choices[0].message.tool_calls[0].function.name == "look"


def test_openai_responses(scripted: Any) -> None:
    client, _ = scripted(Script(REPLY, block=3))
    whole = client.responses.create(model="default", input="hi", tools=[FLAT])
    assert whole.output_text == "Yes, of course."
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    with client.responses.stream(model="default", input="hi", tools=[FLAT]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert final.output_text == "Yes, of course."
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds


def test_openai_responses_are_kept(scripted: Any) -> None:
    client, _ = scripted(Script("one", "two"))
    first = client.responses.create(model="default", input="a")
    second = client.responses.create(model="default", input="b", previous_response_id=first.id)
    again = client.responses.retrieve(second.id)
    assert (again.output_text, again.previous_response_id) == ("two", first.id)
    listed = client.responses.input_items.list(second.id, order="asc", limit=1)  # page by page
    assert [item.content[0].text for item in listed] == ["a", "one", "b"]
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_openai_completions(scripted: Any) -> None:
    client, _ = scripted(Script("and so on"))
    whole = client.completions.create(model="default", prompt="Once", logprobs=1)
    assert whole.choices[0].text == "and so on"
    stream = client.completions.create(model="default", prompt="Once", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "and so on"


def test_openai_errors(scripted: Any) -> None:
    client, _ = scripted(Script("ok", RuntimeError("x")), api_key="none")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="default", messages=[{"role": "elf", "content": "a"}])
    assert caught.value.param == "messages[0].role"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=user())
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    client.chat.completions.create(model="default", messages=user())
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="default", messages=user(), stream=True))


def test_anthropic_messages(scripted: Any) -> None:
    _, client = scripted(Script(REPLY, block=3))
    asked: Any = {"model": "default", "max_tokens": 99, "messages": user(), "tools": [ANTHROPIC]}
    whole = client.messages.create(**asked)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert (whole.content[2].input, whole.stop_reason) == ({"q": "x"}, "tool_use")
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == "Yes, of course."
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[2].input == {"q": "x"}
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert client.messages.count_tokens(model="default", messages=user()).input_tokens > 0
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="default", max_tokens=9, messages=[])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled_within_a_step(stream: bool) -> None:
    script = Script("word " * 400, pause=0.05)
    with running(script, prefix_cache_bytes=0) as url:
        asked = {"messages": user(), "stream": stream}
        started = time.monotonic()
        post = httpx2.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=0.4)
        # The timeout may come before the headers or after them.
        with pytest.raises(httpx2.ReadTimeout), post as response:  # noqa: PT012
            for _ in response.iter_bytes():
                assert stream
                if time.monotonic() - started > 0.4:
                    raise httpx2.ReadTimeout("seen enough")
        assert script.cancelled.acquire(timeout=60)
        settled(url)


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The demo model behind the server."""
    with running(Runtime(), max_concurrent=3) as url:
        yield url


QUICK: dict[str, Any] = {"max_denoising_steps": 2, "canvas_length": 8}


def test_the_demo_model_answers(demo: str) -> None:
    client = openai.OpenAI(base_url=f"{demo}/v1", api_key="none", max_retries=0)

    def ask(**more: Any) -> Any:
        return client.chat.completions.create(
            model="default", messages=user("Reverse: abc"), seed=3, max_tokens=20,
            extra_body=QUICK, **more,
        )  # fmt: skip

    whole = ask()
    again = ask()
    assert whole.choices[0].message.content == again.choices[0].message.content
    streamed = "".join(c.delta.content or "" for k in ask(stream=True) for c in k.choices)
    assert streamed == whole.choices[0].message.content
    scored = ask(logprobs=True).choices[0].logprobs.content
    assert len(scored) == whole.usage.completion_tokens
    assert all(entry.logprob <= 0 for entry in scored)


def test_the_demo_model_fills_a_schema_and_a_gap(demo: str) -> None:
    client = openai.OpenAI(base_url=f"{demo}/v1", api_key="none", max_retries=0)
    properties = {"ok": {"const": "yes"}, "name": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["ok", "name"]}
    wanted: Any = {"name": "x", "schema": schema}
    reply = client.chat.completions.create(
        model="default", messages=user("Who?"), seed=1, extra_body={"max_denoising_steps": 1},
        response_format={"type": "json_schema", "json_schema": wanted},
    )  # fmt: skip
    text = reply.choices[0].message.content
    assert text is not None
    filled = json.loads(text)
    assert list(filled) == ["ok", "name"]
    assert filled["ok"] == "yes"
    assert isinstance(filled["name"], str)
    gap = client.completions.create(
        model="default", prompt="the old ", suffix=" sings.", seed=1,
        extra_body={"max_denoising_steps": 1},
    )  # fmt: skip
    assert gap.choices[0].text


def test_ids_do_not_depend_on_who_else_asks(demo: str) -> None:
    """Eight clients at once, contexts shared and switched between blocks: each seed's own text."""
    client = openai.OpenAI(base_url=f"{demo}/v1", api_key="none", max_retries=0)

    def ask(seed: int) -> str:
        reply = client.chat.completions.create(
            model="default", messages=user("Sort: d a c"), seed=seed, max_tokens=24,
            temperature=1, extra_body=QUICK,
        )  # fmt: skip
        return f"{reply.choices[0].message}"

    alone = [ask(seed) for seed in range(4)]
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: ask(i % 4)})) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(8)] == alone * 2


def test_a_conversation_reuses_its_context(demo: str, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{demo}/v1", api_key="none", max_retries=0)
    system: Any = {"role": "system", "content": "You know a secret: " + "x " * 40}
    first: Any = [system, *user("Reverse: abcd " + "or not " * 20)]
    second = [*first, {"role": "assistant", "content": "dcba"}, *user("Reverse: efgh")]

    def ask(client: Any, messages: Any) -> Any:
        return client.chat.completions.create(
            model="default", messages=messages, seed=1, max_tokens=8, extra_body=QUICK
        )

    def cached(reply: Any) -> int:
        tokens: int = reply.usage.prompt_tokens_details.cached_tokens
        return tokens

    opening = ask(client, first)
    assert cached(opening) == 0
    follow = ask(client, second)
    # All but the turn that the reply was written in.
    assert opening.usage.prompt_tokens - 8 < cached(follow) < opening.usage.prompt_tokens
    assert cached(ask(client, [system, *user("Sort: c b")])) > 40
    # Read afresh by another server, which leaves its contexts to a third.
    for expected in (0, cached(follow)):
        with running(Runtime(), prompt_cache_dir=tmp_path) as url:
            other = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            again = ask(other, second)
        assert (cached(again) > 0) == (expected > 0)
        assert again.choices[0].message.content == follow.choices[0].message.content


def test_the_demo_model_makes_the_call_it_must(demo: str) -> None:
    client = openai.OpenAI(base_url=f"{demo}/v1", api_key="none", max_retries=0)
    tools: Any = list(DECLARATIONS.values())
    for choice in (
        {"type": "function", "function": {"name": "get_time"}},
        "required",
    ):
        reply = client.chat.completions.create(
            model="default", messages=user("What is the weather in Rome?"), tools=tools, seed=1,
            tool_choice=choice,
        )  # fmt: skip
        (call,) = reply.choices[0].message.tool_calls
        assert call.function.name in (("get_time",) if choice != "required" else DECLARATIONS)
        assert isinstance(json.loads(call.function.arguments)["city"], str)


def test_a_short_request_does_not_wait_for_a_long_one(demo: str) -> None:
    client = openai.OpenAI(base_url=f"{demo}/v1", api_key="none", max_retries=0)

    def ask(extra: dict[str, Any], **options: Any) -> Any:
        return client.chat.completions.create(
            model="default", messages=user("Count from 10 to 99"), seed=2,
            extra_body={**QUICK, "empty_reply": "allow", **extra}, **options,
        )  # fmt: skip

    slow = {"max_denoising_steps": 40, "confidence_threshold": 0}  # no block ends early
    with ask(slow, stream=True) as long:
        next(chunk for chunk in long if chunk.choices and chunk.choices[0].delta.content)
        assert ask({}, max_tokens=8).choices[0].finish_reason == "length"
        assert "mlx_dgemma_requests_admitted 1" in httpx2.get(f"{demo}/metrics").text
