"""Where a constraint meets the rest: rows, pins, drafts, caches, pictures, cancelling."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from mlx_dgemma import Constraint, PromptCache, Runtime, load, stream_generate
from mlx_dgemma.constraints import ToolCalls
from mlx_dgemma.decoding import constrained
from mlx_dgemma.decoding.canvas import CanvasRequest, Pins
from mlx_dgemma.decoding.canvas_constraint import CanvasConstraint
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.events import Commit, Draft, Finish
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.demo.tasks.tools import DECLARATIONS
from mlx_dgemma.generate import encode_prompt
from mlx_dgemma.prompt import Tokenizer
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import ServerSettings
from tests.decoding.driving import drive

Demo = tuple[Any, Tokenizer]
DIGITS = r"\d( \d){2,6}"


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load()


def reply(demo: Demo, prompt: Any, **options: Any) -> tuple[str, Finish]:
    *events, finish = stream_generate(*demo, prompt, **options)
    assert isinstance(finish, Finish)
    return "".join(event.text for event in events), finish


def language(demo: Demo, constraint: Constraint) -> CanvasConstraint:
    held = constraint.language(demo[1], demo[0].config.text.vocab_size)
    return CanvasConstraint(held, held.automaton.start, 32, False)


def test_rows_of_a_batch_have_languages_of_their_own(demo: Demo) -> None:
    """Each row commits what it commits alone, one without a language among them."""
    model, tokenizer = demo
    cache = model.make_cache()
    model.prefill(np.array(encode_prompt(tokenizer, "Count from 3 to 9."))[None], cache)
    constraints = [Constraint.regex(DIGITS), None, Constraint.choice(["three", "nine"])]
    settings = DecodingSettings(max_denoising_steps=6)

    def rows() -> list[CanvasRequest]:
        return [
            CanvasRequest(
                SeededDraws(seed), constraint=None if one is None else language(demo, one)
            )
            for seed, one in enumerate(constraints)
        ]

    _, together = drive(denoise_block(model, cache, settings, rows()))
    texts = []
    for row, found in zip(rows(), together, strict=True):
        _, (alone,) = drive(denoise_block(model, cache, settings, [row]))
        np.testing.assert_array_equal(found.ids, alone.ids)
        end = next(at for at, id_ in enumerate(found.ids) if int(id_) in tokenizer.stop_ids)
        texts.append(tokenizer.decode(found.ids[:end].tolist()))
    assert re.fullmatch(DIGITS, texts[0])
    assert texts[1] == "3 4 5 6 7 8 9"
    assert texts[2] in ("three", "nine")


def test_pins_lie_inside_a_language(demo: Demo) -> None:
    """A pinned digit in the middle stays, and the rest is in the language around it."""
    model, tokenizer = demo
    cache = model.make_cache()
    model.prefill(np.array(encode_prompt(tokenizer, "Count from 3 to 9."))[None], cache)
    (seven,) = tokenizer.encode("7")
    pins = Pins.from_template([None, None, None, None, seven, *[None] * 27])
    row = CanvasRequest(SeededDraws(1), pins=pins,
                        constraint=language(demo, Constraint.regex(DIGITS)))  # fmt: skip
    steps, (found,) = drive(denoise_block(model, cache, DecodingSettings(), [row]))
    assert steps
    assert found.ids[4] == seven
    end = next(at for at, id_ in enumerate(found.ids) if int(id_) in tokenizer.stop_ids)
    assert re.fullmatch(DIGITS, tokenizer.decode(found.ids[:end].tolist()))


def test_every_draft_is_in_the_language(demo: Demo) -> None:
    stream = stream_generate(*demo, "Count from 3 to 9.", seed=2, drafts=True,
                             constraint=Constraint.regex(DIGITS))  # fmt: skip
    drafts = [event.draft_text for event in stream if isinstance(event, Draft)]
    assert drafts
    assert all(re.fullmatch(DIGITS, text) for text in drafts)


def test_a_cached_prompt_gives_the_same_reply(demo: Demo) -> None:
    asked: dict[str, Any] = {"seed": 3, "constraint": Constraint.regex(DIGITS)}
    fresh, _ = reply(demo, "Count from 3 to 9.", **asked)
    cache = PromptCache(demo[0])
    prompt = encode_prompt(demo[1], "Count from 3 to 9.")
    for _ in range(2):
        assert reply(demo, "Count from 3 to 9.", cache=cache, **asked)[0] == fresh
        assert len(cache.align(prompt)) < len(prompt)


def test_a_picture_is_asked_about_within_a_choice(demo: Demo) -> None:
    image = Image.new("RGB", (128, 128), (208, 32, 32))
    colors = ["red", "green", "blue"]
    text, finish = reply(demo, "What color is the shape?", images=[image], seed=1,
                         constraint=Constraint.choice(colors))  # fmt: skip
    assert finish.reason == "stop"
    assert text in colors


def test_cancelling_between_two_steps_ends_a_constrained_reply() -> None:
    with Runtime() as runtime:
        cancel = threading.Event()
        events = []
        asked: dict[str, Any] = {"drafts": True, "constraint": Constraint.json_object()}
        for event in runtime.stream(
            "Write JSON with name and pet.", seed=1, cancel=cancel, **asked
        ):
            events.append(event)
            cancel.set()
        assert events[-1].reason == "cancelled"
        assert not any(isinstance(event, Commit) for event in events)
        constraint = Constraint.choice(["yes", "no"])
        assert runtime.generate("Is it?", seed=1, constraint=constraint) in ("yes", "no")


def test_free_text_beside_tools_is_conditioned_from_a_calls_beginning_on(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a call no sum is made and the reply is the unconstrained one; a call is held."""
    counted = []
    original = constrained.condition

    def spy(*arguments: Any, **options: Any) -> Any:
        counted.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(constrained, "condition", spy)
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rome"]}},
                  "required": ["city"]}  # fmt: skip
    constraint = Constraint.tool_calls(ToolCalls((("get_weather", parameters),), forced=False))
    free, _ = reply(demo, "Count from 3 to 9.", seed=1)
    assert reply(demo, "Count from 3 to 9.", seed=1, constraint=constraint)[0] == free
    assert not counted
    tools = [DECLARATIONS["get_weather"]]
    *events, _ = stream_generate(
        *demo, "What is the weather in Oslo?", seed=1, tools=tools, constraint=constraint
    )
    calls = [call for event in events if isinstance(event, Commit) for call in event.tool_calls]
    assert counted
    assert calls == [{"name": "get_weather", "arguments": {"city": "Rome"}}]


ASK = [{"role": "user", "content": "Count from 3 to 9."}]
PLAIN = "<|turn>user\nCount from 3 to 9.<turn|>\n<|turn>model\n"


@pytest.fixture(scope="module")
def server() -> Any:
    with TestClient(create_app(Runtime(), ServerSettings()), base_url="http://127.0.0.1") as client:
        yield client


def test_completions_take_structured_outputs(server: Any) -> None:
    body = {"prompt": PLAIN, "structured_outputs": {"regex": DIGITS}, "n": 2, "seed": 1}
    got = server.post("/v1/completions", json=body).json()
    assert len(got["choices"]) == 2
    assert all(re.fullmatch(DIGITS, choice["text"]) for choice in got["choices"])
    assert all(choice["finish_reason"] == "stop" for choice in got["choices"])
    lines = server.post("/v1/completions", json={**body, "n": 1, "stream": True}).text
    chunks = [json.loads(x[6:]) for x in lines.split("\n\n") if x.startswith("data: {")]
    streamed = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert streamed == got["choices"][0]["text"]
    sides = {"prompt": "the small cat ", "suffix": " the dog in the garden.", "seed": 1}
    body = {**sides, "structured_outputs": {"choice": ["helps", "never sees"]}}
    between = server.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert between in ("helps", "never sees")


@pytest.mark.parametrize("value", ["{", "[" * 5000, "nan"])
def test_a_schema_in_a_string_that_is_no_json_is_one_sentence(server: Any, value: str) -> None:
    for path, asked in (
        ("/v1/chat/completions", {"messages": ASK}),
        ("/v1/completions", {"prompt": "a"}),
    ):
        reply = server.post(path, json={**asked, "structured_outputs": {"json": value}})
        assert reply.status_code == 400
        assert "structured_outputs.json must be" in reply.json()["error"]["message"]


def test_requests_at_once_keep_their_own_languages(server: Any) -> None:
    def ask(number: int) -> str:
        outputs = {"regex": rf"{number}( \d){{2,4}}"}
        body = {"messages": ASK, "structured_outputs": outputs, "seed": number}
        message = server.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        return str(message["content"])

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(ask, range(4)))
    for number, text in enumerate(texts):
        assert re.fullmatch(rf"{number}( \d){{2,4}}", text)
