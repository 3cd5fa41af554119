"""Client libraries and agent frameworks, unmodified, each in the situations of an hour's work.

The network's replies are scripted (see client_scripts); everything else is real.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from mlx_dgemma import Runtime

from .client_scripts import (
    CUT,
    CUT_AT,
    LONG,
    PICTURE,
    PICTURE_URL,
    PLACE,
    call,
    check_held,
    check_three_rounds,
    rendered,
    serving,
    three_rounds,
)
from .conftest import Script, user

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import asks GitHub
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"
QUESTION = "Find one, two and three."


class Place(BaseModel):
    city: str
    country: str


OSLO = Place(city="Oslo", country="Norway")
PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}
FLAT_TOOL: Any = {"type": "function", "name": "look", "parameters": PARAMETERS, "strict": False}
CLAUDE_TOOL: Any = {"name": "look", "description": "Looks.", "input_schema": PARAMETERS}


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The address of a server of the demo model, whose structured replies nobody scripts."""
    with serving(Runtime()) as url:
        yield url


def cancelled(script: Script) -> None:
    """The server noticed that the client left, within a step."""
    assert script.cancelled.acquire(timeout=30)


def slow() -> Script:
    return Script("word " * 400, pause=0.02)


def found(q: str) -> str:
    return f"found {q}"


# openai: chat completions


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1/", api_key="none", max_retries=0)


def test_openai_chat_loop_streamed() -> None:
    script, asked = three_rounds(), []
    messages: list[Any] = user(QUESTION)
    with serving(script) as url:
        client = openai_client(url)
        while True:
            with client.chat.completions.stream(
                model="default", messages=messages, tools=[CHAT_TOOL]
            ) as stream:
                # As many programs read it: without a look at how long the list is.
                pieces = [e.chunk.choices[0].delta for e in stream if e.type == "chunk"]
                message = stream.get_final_completion().choices[0].message
            assert "".join(piece.content or "" for piece in pieces) == (message.content or "")
            messages.append(message)
            for made in message.tool_calls or []:
                asked.append(json.loads(made.function.arguments)["q"])
                content = found(asked[-1])
                messages.append({"role": "tool", "tool_call_id": made.id, "content": content})
            if not message.tool_calls:
                break
    assert message.content == "All done."
    check_three_rounds(script, asked)


def test_openai_chat_parses_a_model(demo: str) -> None:
    done = openai_client(demo).chat.completions.parse(
        model="default", messages=user("Where?"), response_format=Place, max_tokens=200
    )
    assert isinstance(done.choices[0].message.parsed, Place)


def test_openai_chat_parses_a_model_beside_tools() -> None:
    tool = {**CHAT_TOOL, "function": {**CHAT_TOOL["function"], "strict": True}}
    script = Script(PLACE)
    with serving(script) as url:
        done = openai_client(url).chat.completions.parse(
            model="default", messages=user("Where?"), response_format=Place, tools=[tool]
        )
    assert done.choices[0].message.parsed == OSLO
    check_held(script, PLACE)


def test_openai_chat_sends_a_picture() -> None:
    script = Script("A dog.")
    parts = [
        {"type": "text", "text": "?"},
        {"type": "image_url", "image_url": {"url": PICTURE_URL}},
    ]
    with serving(script) as url:
        openai_client(url).chat.completions.create(model="default", messages=user(parts))
    assert len(script.seen[0]["prompt"].images) == 1


def test_openai_chat_long_cut_and_cancelled() -> None:
    with serving(Script(CUT)) as url:
        client = openai_client(url)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="default", messages=user(LONG))
        assert caught.value.code == "context_length_exceeded"
        done = client.chat.completions.create(
            model="default", messages=user(), tools=[CHAT_TOOL], max_tokens=CUT_AT
        )
        choice = done.choices[0]
        assert (choice.message.content, choice.message.tool_calls) == ("I look.", None)
        assert choice.finish_reason == "length"
    script = slow()
    with serving(script) as url:
        stream = openai_client(url).chat.completions.create(
            model="default", messages=user(), stream=True
        )
        next(iter(stream))
        stream.close()
        cancelled(script)


# openai: responses


@pytest.mark.parametrize("way", ["whole conversation", "previous response", "streamed"])
def test_openai_responses_loop(way: str) -> None:
    script, asked, previous = three_rounds(), [], None
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    with serving(script) as url:
        client = openai_client(url)
        while True:
            more: Any = {} if previous is None else {"previous_response_id": previous}
            request: Any = {"model": "default", "input": items, "tools": [FLAT_TOOL], **more}
            if way == "streamed":
                with client.responses.stream(**request) as stream:
                    for _ in stream:
                        pass
                    reply = stream.get_final_response()
            else:
                reply = client.responses.create(**request)
            items = [] if way == "previous response" else [*items, *reply.output]
            previous = reply.id if way == "previous response" else None
            calls = [item for item in reply.output if item.type == "function_call"]
            for made in calls:
                asked.append(json.loads(made.arguments)["q"])
                output = {"type": "function_call_output", "call_id": made.call_id}
                items.append({**output, "output": found(asked[-1])})
            if not calls:
                break
    assert reply.output_text == "All done."
    check_three_rounds(script, asked)


def test_openai_responses_parse_a_model(demo: str) -> None:
    done = openai_client(demo).responses.parse(
        model="default", input="Where?", text_format=Place, max_output_tokens=200
    )
    assert isinstance(done.output_parsed, Place)


def test_openai_responses_parse_a_model_beside_tools() -> None:
    script = Script(PLACE)
    with serving(script) as url:
        done = openai_client(url).responses.parse(
            model="default",
            input="Where?",
            text_format=Place,
            tools=[{**FLAT_TOOL, "strict": True}],
        )
    assert done.output_parsed == OSLO
    check_held(script, PLACE)


def test_openai_responses_picture_long_cut_and_cancelled() -> None:
    script = Script(CUT)
    picture = {"type": "input_image", "image_url": PICTURE_URL, "detail": "auto"}
    with serving(script) as url:
        client = openai_client(url)
        client.responses.create(model="default", input=[{"role": "user", "content": [picture]}])
        assert len(script.seen[0]["prompt"].images) == 1
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="default", input=LONG)
        assert caught.value.code == "context_length_exceeded"
        done = client.responses.create(
            model="default", input="a", tools=[FLAT_TOOL], max_output_tokens=CUT_AT
        )
        assert (done.status, done.output_text, len(done.output)) == ("incomplete", "I look.", 1)
        assert done.incomplete_details is not None
        assert done.incomplete_details.reason == "max_output_tokens"
    script = slow()
    with serving(script) as url:
        stream = openai_client(url).responses.create(model="default", input="a", stream=True)
        next(iter(stream))
        stream.close()
        cancelled(script)


# anthropic


def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


@pytest.mark.parametrize("streamed", [False, True])
def test_anthropic_loop(streamed: bool) -> None:
    script, asked = three_rounds(), []
    messages: list[Any] = user(QUESTION)
    with serving(script) as url:
        client = claude(url)
        while True:
            request: Any = {"model": "claude-haiku-4-5", "max_tokens": 99, "messages": messages}
            request["tools"] = [CLAUDE_TOOL]
            if streamed:
                with client.messages.stream(**request) as stream:
                    reply = stream.get_final_message()
            else:
                reply = client.messages.create(**request)
            messages.append({"role": "assistant", "content": reply.content})
            results = []
            for block in reply.content:
                if block.type == "tool_use":
                    asked.append(block.input["q"])
                    result = {"type": "tool_result", "tool_use_id": block.id}
                    results.append({**result, "content": found(asked[-1])})
            if not results:
                break
            messages.append({"role": "user", "content": results})
    assert (reply.stop_reason, reply.content[0].text) == ("end_turn", "All done.")
    check_three_rounds(script, asked)


def test_anthropic_parses_a_model(demo: str) -> None:
    done = claude(demo).messages.parse(
        model="default", max_tokens=200, messages=user("Where?"), output_format=Place
    )
    assert isinstance(done.parsed_output, Place)


def test_anthropic_parses_a_model_beside_tools() -> None:
    script = Script(PLACE)
    with serving(script) as url:
        done = claude(url).messages.parse(
            model="default",
            max_tokens=99,
            messages=user("Where?"),
            output_format=Place,
            tools=[CLAUDE_TOOL],
        )
    assert done.parsed_output == OSLO
    check_held(script, PLACE)


def test_anthropic_picture_long_cut_and_cancelled() -> None:
    script = Script(CUT)
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE}
    with serving(script) as url:
        client = claude(url)
        shared: Any = {"model": "default", "max_tokens": 99}
        client.messages.create(**shared, messages=user([{"type": "image", "source": source}]))
        assert len(script.seen[0]["prompt"].images) == 1
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
            client.messages.create(**shared, messages=user(LONG))
        done = client.messages.create(
            model="default", max_tokens=CUT_AT, messages=user(), tools=[CLAUDE_TOOL]
        )
        assert [block.type for block in done.content] == ["text"]
        assert done.stop_reason == "max_tokens"
        assert client.models.list().data[0].display_name
    script = slow()
    with serving(script) as url, claude(url).messages.stream(**shared, messages=user()) as stream:
        next(iter(stream))
        stream.close()
        cancelled(script)


# langchain


def chains(url: str) -> dict[str, Any]:
    from langchain_anthropic import ChatAnthropic
    from langchain_openai import ChatOpenAI

    base: Any = {"model": "default", "max_retries": 0}
    here: Any = {**base, "base_url": f"{url}/v1", "api_key": "none"}
    return {
        "chat": ChatOpenAI(**here),
        "responses": ChatOpenAI(**here, use_responses_api=True),
        "anthropic": ChatAnthropic(**base, base_url=url, api_key="none", max_tokens=99),
    }


LANGCHAIN = ("chat", "responses", "anthropic")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", LANGCHAIN)
def test_langchain_loop(kind: str, streamed: bool) -> None:
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    pytest.importorskip("langchain_anthropic", reason="langchain-anthropic is not installed")
    from langchain_core.messages import HumanMessage, ToolMessage

    def look(q: str) -> str:
        """Looks."""
        return found(q)

    script, asked = three_rounds(), []
    messages: list[Any] = [HumanMessage(QUESTION)]
    with serving(script) as url:
        model = chains(url)[kind].bind_tools([look])
        while True:
            if streamed:
                reply: Any = None
                for chunk in model.stream(messages):
                    reply = chunk if reply is None else reply + chunk
            else:
                reply = model.invoke(messages)
            messages.append(reply)
            for made in reply.tool_calls:
                asked.append(made["args"]["q"])
                messages.append(ToolMessage(found(asked[-1]), tool_call_id=made["id"]))
            if not reply.tool_calls:
                break
    assert reply.text == "All done."
    check_three_rounds(script, asked)


@pytest.mark.parametrize("kind", LANGCHAIN)
def test_langchain_structured_output(kind: str, demo: str) -> None:
    pytest.importorskip("langchain_anthropic", reason="langchain-anthropic is not installed")
    model = chains(demo)[kind].with_structured_output(Place, method="json_schema")
    assert isinstance(model.invoke("Where? Answer in JSON."), Place)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("kind", LANGCHAIN)
def test_langchain_structured_output_by_each_method(kind: str, method: str) -> None:
    pytest.importorskip("langchain_anthropic", reason="langchain-anthropic is not installed")
    if kind == "anthropic" and method == "json_mode":
        pytest.skip("ChatAnthropic has no json_mode")
    reply = (
        '<|tool_call>call:Place{city:<|"|>Oslo<|"|>,country:<|"|>Norway<|"|>}<tool_call|>'
        if method == "function_calling"
        else PLACE
    )
    script = Script(reply)
    with serving(script) as url:
        model = chains(url)[kind].with_structured_output(Place, method=method)
        assert model.invoke("Where? Answer in JSON.") == OSLO
    check_held(script, reply)


@pytest.mark.parametrize("kind", LANGCHAIN)
def test_langchain_structured_output_with_tools(kind: str) -> None:
    pytest.importorskip("langchain_anthropic", reason="langchain-anthropic is not installed")

    def look(q: str) -> str:
        """Looks."""
        return found(q)

    schema = Place.model_json_schema()
    given: dict[str, Any] = {
        "chat": {"response_format": Place, "strict": True},
        "responses": {"response_format": Place, "strict": True},
        "anthropic": {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
    }[kind]
    script = Script(call("one"), PLACE)
    with serving(script) as url:
        model = chains(url)[kind].bind_tools([look], **given)
        assert model.invoke("Where?").tool_calls[0]["args"] == {"q": "one"}
        assert json.loads(model.invoke("Where?").text) == OSLO.model_dump()
    check_held(script, call("one"), PLACE)


@pytest.mark.parametrize("kind", LANGCHAIN)
def test_langchain_picture_long_cut_and_cancelled(kind: str) -> None:
    pytest.importorskip("langchain_anthropic", reason="langchain-anthropic is not installed")
    from langchain_core.exceptions import ContextOverflowError
    from langchain_core.messages import HumanMessage

    picture = {"type": "image", "base64": PICTURE, "mime_type": "image/png"}
    script = Script(CUT)
    with serving(script) as url:
        model = chains(url)[kind]
        model.invoke([HumanMessage(content_blocks=[{"type": "text", "text": "?"}, picture])])
        assert len(script.seen[0]["prompt"].images) == 1
        with pytest.raises(ContextOverflowError):  # by which LangChain's agents know to compact
            model.invoke(LONG)
        limit = {"max_output_tokens" if kind == "responses" else "max_tokens": CUT_AT}
        cut = model.bind_tools([CHAT_TOOL]).invoke("a", **limit)
        assert (cut.text, cut.tool_calls, cut.invalid_tool_calls) == ("I look.", [], [])
    script = slow()
    with serving(script) as url:
        stream = chains(url)[kind].stream("a")
        next(stream)
        stream.close()
        cancelled(script)


# pydantic-ai


def pydantic_models(url: str) -> dict[str, Any]:
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    here = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    return {
        "chat": OpenAIChatModel("default", provider=here),
        "responses": OpenAIResponsesModel("default", provider=here),
        "anthropic": AnthropicModel(
            "claude-sonnet-4-5", provider=AnthropicProvider(base_url=url, api_key="none")
        ),
    }


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", LANGCHAIN)
def test_pydantic_ai_loop(kind: str, streamed: bool) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
    script, asked = three_rounds(), []
    with serving(script) as url:
        agent = pydantic_ai.Agent(pydantic_models(url)[kind])

        @agent.tool_plain
        def look(q: str) -> str:
            asked.append(q)
            return found(q)

        async def ask() -> str:
            async with agent.run_stream(QUESTION) as stream:
                return str(await stream.get_output())

        # run_stream takes the first text for the answer, so the loop there ends with "Next."
        if streamed:
            script.replies[1] = call("two")
        answer = asyncio.run(ask()) if streamed else agent.run_sync(QUESTION).output
    assert answer == "All done."
    if not streamed:
        check_three_rounds(script, asked)
    assert asked == ["one", "two", "three"]


@pytest.mark.parametrize("output", ["native", "tool", "prompted"])
@pytest.mark.parametrize("kind", LANGCHAIN)
def test_pydantic_ai_output(kind: str, output: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
    final = (
        '<|tool_call>call:final_result{city:<|"|>Oslo<|"|>,country:<|"|>Norway<|"|>}<tool_call|>'
    )
    last = final if output == "tool" else PLACE
    wrap = {"native": pydantic_ai.NativeOutput, "tool": pydantic_ai.ToolOutput,
            "prompted": pydantic_ai.PromptedOutput}[output]  # fmt: skip
    script = Script(call("one"), last)
    with serving(script, max_prompt_tokens=2000) as url:
        agent = pydantic_ai.Agent(pydantic_models(url)[kind], output_type=wrap(Place))
        asked = []

        @agent.tool_plain
        def look(q: str) -> str:
            asked.append(q)
            return found(q)

        assert agent.run_sync("Where?").output == OSLO
    assert asked == ["one"]
    if output != "prompted" or kind != "anthropic":  # whose prompted output asks for no format
        check_held(script, call("one"), last)


@pytest.mark.parametrize("kind", LANGCHAIN)
def test_pydantic_ai_native_output_of_the_model(kind: str, demo: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
    output = pydantic_ai.NativeOutput(Place)
    agent = pydantic_ai.Agent(pydantic_models(demo)[kind], output_type=output, retries=0)
    assert isinstance(agent.run_sync("Where?").output, Place)


@pytest.mark.parametrize("kind", LANGCHAIN)
def test_pydantic_ai_picture_long_cut_and_cancelled(kind: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
    import base64

    script = Script("A dog.")
    with serving(script) as url:
        agent = pydantic_ai.Agent(pydantic_models(url)[kind])
        picture = pydantic_ai.BinaryContent(base64.b64decode(PICTURE), media_type="image/png")
        assert agent.run_sync(["?", picture]).output == "A dog."
        assert len(script.seen[0]["prompt"].images) == 1
        with pytest.raises(pydantic_ai.exceptions.ModelHTTPError) as caught:
            agent.run_sync(LONG)
        assert caught.value.status_code == 400
    script = Script(CUT)
    with serving(script) as url:
        agent = pydantic_ai.Agent(pydantic_models(url)[kind])
        agent.tool_plain(found)
        # A cut call is text that was cut; it is neither run nor asked for again.
        assert agent.run_sync("a", model_settings={"max_tokens": CUT_AT}).output == "I look."
    script = slow()

    async def leave(agent: Any) -> None:
        async with agent.run_stream("a") as stream:
            async for _ in stream.stream_text(debounce_by=None):
                break
            await asyncio.sleep(0)

    with serving(script) as url:
        asyncio.run(leave(pydantic_ai.Agent(pydantic_models(url)[kind])))
        cancelled(script)


# openai-agents


def agents_model(url: str, kind: str) -> Any:
    from agents import OpenAIChatCompletionsModel, OpenAIResponsesModel

    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    made = OpenAIChatCompletionsModel if kind == "chat" else OpenAIResponsesModel
    return made(model="default", openai_client=client)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_agents_sdk_loop(kind: str, streamed: bool) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    script, asked = three_rounds(), []

    @agents.function_tool
    def look(q: str) -> str:
        """Looks."""
        asked.append(q)
        return found(q)

    async def ask(agent: Any) -> Any:
        if not streamed:
            return (await agents.Runner.run(agent, QUESTION)).final_output
        run = agents.Runner.run_streamed(agent, QUESTION)
        async for _ in run.stream_events():
            pass
        return run.final_output

    with serving(script) as url:
        agent = agents.Agent(name="a", model=agents_model(url, kind), tools=[look])
        assert asyncio.run(ask(agent)) == "All done."
    check_three_rounds(script, asked)


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_agents_sdk_output_type_with_tools(kind: str, demo: str) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    asked = []

    @agents.function_tool
    def look(q: str) -> str:
        """Looks."""
        asked.append(q)
        return found(q)

    def answer(url: str, tools: list[Any]) -> Any:
        agent = agents.Agent(
            name="a", model=agents_model(url, kind), tools=tools, output_type=Place
        )
        return asyncio.run(agents.Runner.run(agent, "Where?")).final_output

    script = Script(call("one"), PLACE)
    with serving(script) as url:
        assert answer(url, [look]) == OSLO
    check_held(script, call("one"), PLACE)
    assert isinstance(answer(demo, []), Place)
    assert asked == ["one"]


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_agents_sdk_picture_long_cut_and_cancelled(kind: str) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    script = Script("A dog.")
    picture: Any = {"type": "input_image", "image_url": PICTURE_URL, "detail": "auto"}

    async def ask(url: str, given: Any, **settings: Any) -> Any:
        agent = agents.Agent(
            name="a",
            model=agents_model(url, kind),
            model_settings=agents.ModelSettings(**settings),
            tools=[agents.function_tool(found)],
        )
        return (await agents.Runner.run(agent, given)).final_output

    with serving(script) as url:
        assert asyncio.run(ask(url, [{"role": "user", "content": [picture]}])) == "A dog."
        assert len(script.seen[0]["prompt"].images) == 1
        with pytest.raises(openai.BadRequestError):
            asyncio.run(ask(url, LONG))
    with serving(Script(CUT)) as url:
        if kind == "chat":
            assert asyncio.run(ask(url, "a", max_tokens=CUT_AT)) == "I look."
        else:  # the SDK itself ends a run whose response is incomplete
            with pytest.raises(agents.ModelBehaviorError, match="max_output_tokens"):
                asyncio.run(ask(url, "a", max_tokens=CUT_AT))
    script = slow()

    async def leave(url: str) -> None:
        run = agents.Runner.run_streamed(agents.Agent(name="a", model=agents_model(url, kind)), "a")
        async for event in run.stream_events():
            if event.type == "raw_response_event" and event.data.type.endswith(".delta"):
                break
        run.cancel()
        async for _ in run.stream_events():
            pass
        await asyncio.to_thread(cancelled, script)

    with serving(script) as url:
        asyncio.run(leave(url))


# litellm


LITELLM = ("openai/default", "anthropic/default", "openai/responses/default")


def lite(url: str, model: str, **more: Any) -> Any:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    base = url if model.startswith("anthropic") else f"{url}/v1"
    return litellm.completion(model=model, api_base=base, api_key="none", num_retries=0, **more)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model", LITELLM)
def test_litellm_loop(model: str, streamed: bool) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    script, asked = three_rounds(), []
    messages: list[Any] = user(QUESTION)
    with serving(script) as url:
        while True:
            reply = lite(url, model, messages=messages, tools=[CHAT_TOOL], stream=streamed)
            if streamed:
                reply = litellm.stream_chunk_builder(list(reply), messages=messages)
            message = reply.choices[0].message
            messages.append(message)
            for made in message.tool_calls or []:
                asked.append(json.loads(made.function.arguments)["q"])
                content = found(asked[-1])
                messages.append({"role": "tool", "tool_call_id": made.id, "content": content})
            if not message.tool_calls:
                break
    assert message.content == "All done."
    check_three_rounds(script, asked)


@pytest.mark.parametrize("model", LITELLM[:1] + LITELLM[2:])
def test_litellm_structured_output(model: str, demo: str) -> None:
    asked = {"messages": user("Where?"), "response_format": Place, "max_tokens": 200}
    reply = lite(demo, model, **asked)
    Place.model_validate_json(reply.choices[0].message.content)


@pytest.mark.parametrize("model", LITELLM[:1] + LITELLM[2:])
def test_litellm_structured_output_beside_tools(model: str) -> None:
    script = Script(PLACE)
    with serving(script) as url:
        asked = {"messages": user("Where?"), "response_format": Place, "tools": [CHAT_TOOL]}
        reply = lite(url, model, **asked)
    assert Place.model_validate_json(reply.choices[0].message.content) == OSLO
    check_held(script, PLACE)


@pytest.mark.parametrize("model", LITELLM)
def test_litellm_picture_long_cut_and_cancelled(model: str) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    script = Script(CUT)
    parts = [
        {"type": "text", "text": "?"},
        {"type": "image_url", "image_url": {"url": PICTURE_URL}},
    ]
    with serving(script) as url:
        lite(url, model, messages=user(parts))
        assert len(script.seen[0]["prompt"].images) == 1
        with pytest.raises(litellm.ContextWindowExceededError):
            lite(url, model, messages=user(LONG))
        cut = lite(url, model, messages=user(), tools=[CHAT_TOOL], max_tokens=CUT_AT).choices[0]
        assert (cut.message.content, cut.message.tool_calls or None) == ("I look.", None)
        assert cut.finish_reason == "length"
    script = slow()

    async def leave(url: str) -> None:
        base = url if model.startswith("anthropic") else f"{url}/v1"
        stream = await litellm.acompletion(
            model=model, api_base=base, api_key="none", messages=user(), stream=True
        )
        async for _ in stream:
            break
        await stream.aclose()

    if "responses" in model:
        return  # closing litellm's stream leaves the response under it open
    with serving(script) as url:
        asyncio.run(leave(url))
        cancelled(script)


def test_the_prompt_of_an_alias_is_the_models() -> None:
    """Names of other models change nothing of what is read."""
    one, two = Script("ok"), Script("ok")
    for script, model in ((one, "default"), (two, "claude-opus-4-1")):
        with serving(script) as url:
            claude(url).messages.create(model=model, max_tokens=9, messages=user("a"))
    assert rendered(one) == rendered(two)
