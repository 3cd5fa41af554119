"""Scores over HTTP: of prompts (`echo`), of replies, their alternatives, and lists of prompts.

The network is the demo's: these numbers are its own.
"""

import json
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from mlx_dgemma.runtime import Runtime
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import ServerSettings

from .conftest import Open, Script, user

URL = "/v1/completions"
TEXT = "Reverse: h\u00e9llo \U0001f9e9 end"


@pytest.fixture(scope="module")
def runtime() -> Any:
    with Runtime() as opened:
        yield opened


@pytest.fixture(scope="module")
def client(runtime: Runtime) -> Any:
    app = create_app(runtime, ServerSettings())
    with TestClient(app, base_url="http://127.0.0.1") as opened:
        yield opened


def expected(runtime: Runtime, ids: list[int]) -> np.ndarray:
    """float64 [S, V]: log-probabilities of what follows each token, all at once."""
    model = runtime.model

    def compute() -> np.ndarray:
        hidden = model.encode(ids, model.make_cache())
        return np.array(model.softcap(model.raw_logits(hidden[0])), dtype=np.float64)

    logits = runtime.call(compute)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_a_prompt_is_scored_and_nothing_is_generated(client: TestClient, runtime: Runtime) -> None:
    asked = {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 3}
    body = client.post(URL, json=asked).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    listed = choice["logprobs"]
    assert "".join(listed["tokens"]) == TEXT
    for token, at in zip(listed["tokens"], listed["text_offset"], strict=True):
        assert TEXT[at : at + len(token)] == token
    ids = [runtime.tokenizer.ids["bos"], *runtime.tokenizer.encode(TEXT)]
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert body["usage"]["completion_tokens"] == 0
    assert len(listed["tokens"]) == len(ids) - 1  # the bos is no part of the text
    log_p = expected(runtime, ids)
    own = [log_p[place, id_] for place, id_ in enumerate(ids[1:])]
    assert listed["token_logprobs"] == pytest.approx(own, abs=1e-4)
    for top, row, value in zip(
        listed["top_logprobs"], log_p, listed["token_logprobs"], strict=False
    ):
        assert list(top.values())[:3] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)
        assert value in top.values()


def test_ids_are_listed_one_for_one_and_the_first_has_no_score(
    client: TestClient, runtime: Runtime
) -> None:
    tokenizer = runtime.tokenizer
    padded = [tokenizer.ids["bos"], tokenizer.ids["pad"], *tokenizer.encode("abc")]
    asked: dict[str, Any] = {"prompt": padded, "max_tokens": 0, "echo": True, "logprobs": 1}
    listed = client.post(URL, json=asked).json()["choices"][0]["logprobs"]
    assert len(listed["tokens"]) == len(padded)
    ids = [tokenizer.ids["bos"], *tokenizer.encode("abc def")]
    asked = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    listed = client.post(URL, json=asked).json()["choices"][0]["logprobs"]
    assert len(listed["tokens"]) == len(ids)
    assert listed["tokens"][0] == ""
    assert (listed["token_logprobs"][0], listed["top_logprobs"][0]) == (None, None)
    text = client.post(URL, json={**asked, "prompt": "abc def"}).json()["choices"][0]["logprobs"]
    assert listed["token_logprobs"][1:] == text["token_logprobs"]


def test_what_scorers_send_gets_exactly_one_token_more(client: TestClient) -> None:
    asked = {"prompt": ["abc def", "Sort: b a"], "max_tokens": 1, "temperature": 0,
             "echo": True, "logprobs": 1, "seed": 1234}  # fmt: skip
    body = client.post(URL, json=asked).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice, prompt in zip(body["choices"], asked["prompt"], strict=True):
        listed = choice["logprobs"]
        alone = client.post(URL, json={**asked, "prompt": prompt, "max_tokens": 0}).json()
        before = alone["choices"][0]["logprobs"]
        assert listed["token_logprobs"][:-1] == before["token_logprobs"]
        assert len(listed["tokens"]) == len(before["tokens"]) + 1
        assert listed["tokens"][-1]
        assert choice["text"] == prompt + listed["tokens"][-1]
        assert max(listed["top_logprobs"][-1].values()) >= listed["token_logprobs"][-1]


def test_an_echo_streams_like_it_comes_whole(client: TestClient) -> None:
    asked = {"prompt": "Sort: b a", "max_tokens": 3, "max_denoising_steps": 2, "seed": 3,
             "echo": True, "logprobs": 2}  # fmt: skip
    whole = client.post(URL, json=asked).json()["choices"][0]
    lines = client.post(URL, json={**asked, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [one for part in parts if part["logprobs"] for one in part["logprobs"][name]]
        assert streamed == whole["logprobs"][name]


def test_chat_lists_the_alternatives_it_is_asked_for(client: TestClient, runtime: Runtime) -> None:
    asked = {"messages": user("Reverse the letters ABC"), "max_tokens": 4, "seed": 1,
             "max_denoising_steps": 3, "top_logprobs": 4}  # fmt: skip
    body = client.post("/v1/chat/completions", json=asked).json()
    assert body["x_warnings"] == []
    content = body["choices"][0]["logprobs"]["content"]
    assert content
    for entry in content:
        values = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert values[0] == entry["logprob"]  # what is committed is the draft, the likeliest
    refused = client.post("/v1/chat/completions", json={**asked, "top_logprobs": 21})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")


def test_prompts_of_a_list_have_choices_and_a_usage_of_their_own(serve: Open) -> None:
    script = Script("one", "two", "three", "four")
    body = serve(script).post(URL, json={"prompt": ["a", [1, 2, 3]], "n": 2, "seed": 5}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert sorted(seen["seed"] for seen in script.seen) == [5, 5, 6, 6]
    prompts = sorted(tuple(seen["prompt"].ids) for seen in script.seen)
    assert prompts[0] == prompts[1] == (1, 2, 3)
    assert body["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2])


def test_no_token_and_no_echo_is_an_empty_reply(serve: Open) -> None:
    script = Script("never")
    body = serve(script).post(URL, json={"prompt": "a", "max_tokens": 0}).json()
    assert (body["choices"][0]["text"], script.seen) == ("", [])
