"""vLLM's read-only form on /v1/chat/completions: a canvas in, log-probabilities out."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from starlette.testclient import TestClient

from mlx_dgemma.generate import encode_prompt
from mlx_dgemma.runtime import Runtime
from mlx_dgemma.server.app import create_app

ASKED = "Which letter of PSIJT comes last in the alphabet?"
CANVAS = [500, 16, *[1] * 14]
LETTERS = [329, 332, 322, 323, 333]  # P S I J T


@pytest.fixture(scope="module")
def runtime():
    with Runtime() as runtime:
        yield runtime


@pytest.fixture(scope="module")
def client(runtime):
    with TestClient(create_app(runtime), base_url="http://127.0.0.1") as client:
        yield client


def read(client: Any, *, xargs: Any = None, **fields: Any) -> Any:
    arguments = {
        "diffusion_seed_canvas": CANVAS,
        "diffusion_canvas_length": len(CANVAS),
        "diffusion_max_steps": 1,
        "diffusion_read_only": True,
        **(xargs or {}),
    }
    body = {
        "messages": [{"role": "user", "content": ASKED}],
        "logprobs": True,
        "vllm_xargs": {name: value for name, value in arguments.items() if value is not None},
        **fields,
    }
    return client.post("/v1/chat/completions", json=body)


def rows(reply: Any) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["logprobs"]["content"]


def test_a_row_for_each_position_of_one_pass(client, runtime):
    found = rows(read(client, top_logprobs=5, return_tokens_as_token_ids=True))
    model = runtime.model
    context = model.make_cache()
    model.prefill(np.array(encode_prompt(runtime.tokenizer, ASKED))[None], context)
    logits = np.array(model.denoise(mx.array(CANVAS)[None], context))[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert len(found) == len(CANVAS)
    for row, logs in zip(found, expected, strict=True):
        assert row["token"] == f"token_id:{logs.argmax()}"
        assert row["logprob"] == pytest.approx(logs.max(), abs=1e-4)
        assert len(row["top_logprobs"]) == 5
        for one in row["top_logprobs"]:
            assert one["logprob"] == pytest.approx(logs[int(one["token"][9:])], abs=1e-4)
    assert runtime.tokenizer.decode([int(found[0]["token"][9:])]) == "T"


def test_only_the_rows_and_ids_that_were_asked_for(client, runtime):
    assert [runtime.tokenizer.decode([id_]) for id_ in LETTERS] == [*"PSIJT"]
    free = rows(read(client, logprob_token_ids=LETTERS, max_tokens=2))
    assert len(free) == 2
    assert sorted(one["token"] for one in free[0]["top_logprobs"]) == sorted("PSIJT")
    assert sum(math.exp(one["logprob"]) for one in free[0]["top_logprobs"]) < 1
    held = rows(
        read(client, logprob_token_ids=LETTERS, xargs={"diffusion_constrained": True}, max_tokens=1)
    )
    listed = held[0]["top_logprobs"]
    assert sum(math.exp(one["logprob"]) for one in listed) == pytest.approx(1, abs=1e-5)
    assert [one["token"] for one in listed] == [one["token"] for one in free[0]["top_logprobs"]]
    assert held[0]["token"] == listed[0]["token"] == "T"


def test_the_same_read_again_costs_one_pass_and_says_the_same(client):
    first, again = read(client).json(), read(client).json()
    assert again["choices"][0]["logprobs"] == first["choices"][0]["logprobs"]
    assert (
        again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"]
    )
    assert again["choices"][0]["x_diffusion"]["steps_per_block"] == [1]


def test_pinned_positions_and_a_stream_change_nothing(client):
    plain = rows(read(client))
    assert rows(read(client, xargs={"diffusion_pinned": [1, 2, 15]})) == plain
    assert '"finish_reason":"stop"' in read(client, stream=True).text.replace(" ", "")


@pytest.mark.parametrize(
    ("xargs", "fields", "named"),
    [
        ({"diffusion_seed_canvas": CANVAS[:-1]}, {}, "diffusion_seed_canvas"),
        ({"diffusion_seed_canvas": None}, {}, "diffusion_seed_canvas"),
        ({"diffusion_canvas_length": None}, {}, "diffusion_seed_canvas"),
        ({"diffusion_canvas_length": 10**9}, {}, "diffusion_canvas_length"),
        ({"diffusion_seed_canvas": [10**9] * 16}, {}, "diffusion_seed_canvas"),
        ({"diffusion_seed_canvas": [True] * 16}, {}, "diffusion_seed_canvas"),
        ({"diffusion_seed_canvas": "x"}, {}, "diffusion_seed_canvas"),
        ({"diffusion_pinned": [16]}, {}, "diffusion_pinned"),
        ({"diffusion_max_steps": 2}, {}, "diffusion_max_steps"),
        ({"diffusion_read_only": False}, {}, "diffusion_read_only"),
        ({"diffusion_read_only": "yes"}, {}, "diffusion_read_only"),
        ({"diffusion_constrained": True}, {}, "logprob_token_ids"),
        ({}, {"logprob_token_ids": [-1]}, "logprob_token_ids"),
        ({}, {"logprob_token_ids": [1, 1]}, "logprob_token_ids"),
        ({}, {"logprob_token_ids": [*range(129)]}, "logprob_token_ids"),
        ({}, {"stop": "x"}, "diffusion_read_only"),
        ({}, {"response_format": {"type": "json_object"}}, "diffusion_read_only"),
        ({}, {"vllm_xargs": [1]}, "vllm_xargs"),
        ({}, {"vllm_xargs": None, "logprob_token_ids": [5]}, "logprob_token_ids"),
    ],
)
def test_what_cannot_be_read_is_named(client, xargs, fields, named):
    reply = read(client, xargs=xargs, **fields)
    assert reply.status_code == 400, reply.text
    assert named in reply.json()["error"]["message"]


def test_replies_name_their_tokens_by_ids_where_that_is_asked(client):
    body = {"messages": [{"role": "user", "content": "Reverse KXB"}], "logprobs": True}
    plain, by_id = (
        rows(client.post("/v1/chat/completions", json={**body, "seed": 1, **more}))
        for more in ({}, {"return_tokens_as_token_ids": True})
    )
    assert [row["logprob"] for row in plain] == [row["logprob"] for row in by_id]
    assert all(row["token"].startswith("token_id:") for row in by_id)
