"""A GPU that gives up: one sentence everywhere, and the next request is served."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from starlette.testclient import TestClient

from mlx_dgemma import Runtime, decide, generate, infill, load
from mlx_dgemma.cli import chat as chat_command
from mlx_dgemma.cli import decide as decide_command
from mlx_dgemma.cli import generate as generate_command
from mlx_dgemma.cli import infill as infill_command
from mlx_dgemma.context.prompt_cache import PromptCache
from mlx_dgemma.errors import GpuError, GpuMemoryError
from mlx_dgemma.machine import gpu_failures
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import ServerSettings

METAL = "[METAL] Command buffer execution failed: "
MEMORY = METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
SCREEN = (
    METAL + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingIn"
    "teractivity)."
)
SLOW = METAL + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
VICTIM = (
    METAL + "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallback"
    "ErrorInnocentVictim)."
)
TOO_LARGE = (
    "[metal::malloc] Attempting to allocate 99999999999 bytes which is greater than the maximum "
    "allowed buffer size of 17179869184 bytes."
)
SENTENCES = {
    MEMORY: (GpuMemoryError, "The GPU ran out of memory: close other programs, ", "--kv-bits 8"),
    TOO_LARGE: (GpuMemoryError, "The memory ran out: close other programs, ", "fewer bits."),
    SCREEN: (GpuError, "the screen had to wait", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"),
    SLOW: (GpuError, "took too long", "MLX_MAX_OPS_PER_BUFFER=8"),
    VICTIM: (GpuError, "victim of GPU error/recovery", "run this again"),
}
QUICK = {"seed": 3, "max_denoising_steps": 3, "max_tokens": 12}
FLAGS = ["--seed", "3", "--max-denoising-steps", "3"]
PROMPT = "Reverse: abc"
ASKED = {"money": {"type": "noul", "instructions": "Does the writer want money back?"}}


@pytest.fixture
def fail(monkeypatch):
    """fail(message, after): the evaluation after so many others fails, once."""
    real = mx.eval

    def arm(message, after):
        left = [after]

        def evaluate(*arrays):
            left[0] -= 1
            if left[0] == -1:
                raise RuntimeError(message)
            return real(*arrays)

        monkeypatch.setattr(mx, "eval", evaluate)

    return arm


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.mark.parametrize("message", SENTENCES)
def test_each_failure_is_a_sentence_with_the_way_out(message):
    kind, *words = SENTENCES[message]
    told = gpu_failures.explanation(RuntimeError(message))
    assert type(told) is kind
    sentence = str(told)
    assert all(word in sentence for word in words)
    assert sentence.endswith(".")
    assert "kIOGPU" not in sentence.partition("victim")[0]


def test_the_limit_is_named_where_raising_it_helps(monkeypatch):
    here = replace(gpu_failures.machine(), memory=64 << 30, metal=True, working_set=48 << 30)
    monkeypatch.setattr(gpu_failures, "machine", lambda: here)
    assert "sudo sysctl iogpu.wired_limit_mb=62" in str(gpu_failures._less_memory())
    monkeypatch.setattr(gpu_failures, "machine", lambda: replace(here, working_set=64 << 30))
    assert "wired_limit" not in gpu_failures._less_memory()


def test_what_is_no_failure_of_the_gpu_stays_what_it_is():
    assert gpu_failures.explanation(RuntimeError("a bug")) is None
    assert gpu_failures.explanation(ValueError(MEMORY)) is None
    with pytest.raises(RuntimeError, match="a bug"), gpu_failures.explained():
        raise RuntimeError("a bug")
    assert isinstance(gpu_failures.explanation(MemoryError()), GpuMemoryError)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("message", [MEMORY, SCREEN])
def test_the_api_raises_it_and_a_cache_can_be_used_again(demo, fail, message, after):
    kind = SENTENCES[message][0]
    expected = generate(*demo, PROMPT, **QUICK)
    cache = PromptCache(demo[0])
    generate(*demo, PROMPT, cache=cache, **QUICK)
    fail(message, after)
    with pytest.raises(kind):
        generate(*demo, PROMPT, cache=cache, **QUICK)
    assert cache.ids == []
    assert cache.cache.offset == 0
    assert generate(*demo, PROMPT, cache=cache, **QUICK) == expected
    fail(message, after)
    with pytest.raises(kind):
        infill(*demo, "the <hole:2> sings.", seed=1, max_denoising_steps=2)
    fail(message, after)
    with pytest.raises(kind):
        decide(*demo, "I want my money back.", ASKED, cache=cache)
    assert decide(*demo, "I want my money back.", ASKED, cache=cache).answers


@pytest.mark.parametrize("message", [MEMORY, SLOW])
def test_a_runtime_serves_the_next_request(fail, message):
    with Runtime() as runtime:
        expected = runtime.generate(PROMPT, **QUICK)
        for after in (0, 1, 3):
            fail(message, after)
            with pytest.raises(SENTENCES[message][0]):
                runtime.generate(PROMPT, **QUICK)
            assert runtime.generate(PROMPT, **QUICK) == expected
        fail(message, 0)
        with pytest.raises(SENTENCES[message][0]):
            runtime.call(lambda: mx.eval(mx.zeros(1)))
        assert runtime.waiting == 0


@pytest.mark.parametrize("message", [MEMORY, SCREEN, SLOW])
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (generate_command, ["--prompt", PROMPT, *FLAGS]),
        (infill_command, ["the <hole:2> sings.", *FLAGS]),
        (decide_command, ["--state", "Money!", "-q", "Is the writer angry?"]),
    ],
    ids=["generate", "infill", "decide"],
)
def test_a_command_says_it_and_exits_with_2(fail, capsys, monkeypatch, command, arguments, message):
    loaded = load()
    monkeypatch.setattr("mlx_dgemma.checkpoint.loading.load", lambda *_, **__: loaded)
    fail(message, 1)
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert SENTENCES[message][1] in errors[0]
    assert "Traceback" not in captured.err


def test_a_chat_goes_on(fail, capsys, monkeypatch):
    lines = iter([PROMPT, PROMPT, None])
    loaded = load()
    monkeypatch.setattr("mlx_dgemma.checkpoint.loading.load", lambda *_, **__: loaded)
    monkeypatch.setattr(chat_command, "_reader", lambda: lambda: next(lines))
    fail(SCREEN, 1)
    assert chat_command.main([*FLAGS, "--max-tokens", "6"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("error: macOS stopped the GPU's work") == 1
    assert captured.out.strip()


@pytest.mark.parametrize(("message", "status"), [(MEMORY, 507), (SCREEN, 503), (SLOW, 503)])
def test_the_server_answers_with_json_and_serves_the_next_request(fail, message, status):
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}]},
        "/v1/messages": {"messages": [{"role": "user", "content": PROMPT}]},
        "/v1/systemone": {"state": "Money!", "questions": ASKED},
    }
    common = {"model": "default", "max_tokens": 8, "seed": 1}
    app = create_app(Runtime(), ServerSettings())
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        for path, body in bodies.items():
            if path != "/v1/systemone":
                body = {**common, **body}
            fail(message, 1)
            answer = client.post(path, json=body)
            assert answer.status_code == status, answer.text
            assert SENTENCES[message][1] in answer.text
            assert client.post(path, json=body).status_code == 200
        fail(message, 1)
        streamed = {**common, **bodies["/v1/chat/completions"], "stream": True}
        text = client.post("/v1/chat/completions", json=streamed).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert SENTENCES[message][1] in events[-1]["error"]["message"]
        assert client.post("/v1/chat/completions", json=streamed).status_code == 200
