"""An agent framework, unmodified: it declares tools, runs what is called, and gets an answer."""

from typing import Any

import pytest
from pydantic import BaseModel

from mlx_dgemma.runtime import Runtime

from .client_scripts import check_held
from .conftest import Script
from .test_clients import running

pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
from pydantic_ai.models.openai import OpenAIChatModel  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402


class Place(BaseModel):
    city: str
    country: str


def model(url: str) -> Any:
    return OpenAIChatModel("default", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="-"))


def test_the_demo_model_looks_the_weather_up() -> None:
    with running(Runtime()) as url:
        agent = pydantic_ai.Agent(model(url))
        asked: list[str] = []

        @agent.tool_plain
        def get_weather(city: str) -> str:
            """Get the weather in a city."""
            asked.append(city)
            return "25 degrees and sunny"

        for seed in range(4):
            asked.clear()
            done = agent.run_sync("What is the weather in Rome?", model_settings={"seed": seed})
            if asked == ["Rome"] and "25 degrees and sunny" in done.output:
                break
        else:
            pytest.fail(f"the last of four tries asked for {asked} and said {done.output!r}")
        assert done.usage.requests == 2
        assert done.usage.cache_read_tokens > 0


def test_a_structured_answer_is_a_forced_call() -> None:
    right = (
        '<|tool_call>call:final_result{city:<|"|>Oslo<|"|>,country:<|"|>Norway<|"|>}<tool_call|>'
    )
    script = Script(right)
    with running(script, prefix_cache_bytes=0) as url:
        agent = pydantic_ai.Agent(model(url), output_type=Place)
        assert agent.run_sync("Where is Oslo?").output == Place(city="Oslo", country="Norway")
    assert len(script.seen) == 1
    check_held(script, right)
