"""The public functions on the bundled demo checkpoint; what it answers is tested elsewhere."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import FrozenInstanceError, replace
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from mlx_dgemma import Commit, Draft, Finish, PromptCache, generate, load, stream_generate
from mlx_dgemma.checkpoint import loading
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.decoding.trace import Trace
from mlx_dgemma.errors import CheckpointError, InputError, ModelNotFoundError, ResourceError
from mlx_dgemma.generate import Options, encode_prompt
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.replaying import replay

PROMPT = "Count from 3 to 9."
QUICK = {"max_denoising_steps": 2, "max_tokens": 40, "seed": 4}


@pytest.fixture(scope="module")
def demo():
    return load()


def test_every_public_name_is_there():
    assert all(hasattr(mlx_dgemma, name) for name in mlx_dgemma.__all__)


def test_generate_joins_what_stream_generate_commits(demo):
    events = list(stream_generate(*demo, PROMPT, **QUICK))
    assert generate(*demo, PROMPT, **QUICK) == "".join(event.text for event in events)
    assert isinstance(events[-1], Finish)
    assert events[-1].seed == 4
    assert events[-1].prompt_tokens == len(encode_prompt(demo[1], PROMPT))


def test_no_limit_of_tokens_is_the_default(demo):
    """Wrappers pass on None for what their caller left out."""
    options = {**QUICK, "max_tokens": None}
    assert generate(*demo, PROMPT, **options) == generate(
        *demo, PROMPT, **{**QUICK, "max_tokens": 256}
    )


def test_drafts_come_when_asked_for_and_add_no_text(demo):
    plain = list(stream_generate(*demo, PROMPT, **QUICK))
    drafted = list(stream_generate(*demo, PROMPT, drafts=True, **QUICK))
    drafts = [event for event in drafted if isinstance(event, Draft)]
    assert not any(isinstance(event, Draft) for event in plain)
    assert [draft.step for draft in drafts if draft.block == 0] == [1, 2]
    assert all(draft.text == "" and isinstance(draft.draft_text, str) for draft in drafts)
    assert [event for event in drafted if isinstance(event, Commit)] == plain[:-1]


def test_events_are_frozen(demo):
    event = next(stream_generate(*demo, PROMPT, **QUICK))
    with pytest.raises(FrozenInstanceError):
        event.text = "other"


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT,
        [{"role": "user", "content": PROMPT}],
        [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
    ],
)
def test_a_message_may_come_in_any_form(demo, prompt):
    _, tokenizer = demo
    ids = encode_prompt(tokenizer, prompt)
    assert ids == encode_prompt(tokenizer, np.array(ids))
    assert PROMPT in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ([], "empty"),
        ([[1, 2]], "flat list"),
        ([0.5], "flat list"),
        ([1, [2, 3]], "flat list"),
        (None, "A prompt is a str, a list of messages"),
        (7, "A prompt is a str, a list of messages"),
        ({"role": "user", "content": "hi"}, "A prompt is a str, a list of messages"),
        ((token for token in (1, 2)), "A prompt is a str, a list of messages"),
        ([10**6], "outside the vocabulary"),
        ([{"role": "wizard", "content": "hi"}], "role"),
    ],
)
def test_impossible_prompts_are_explained(demo, prompt, words):
    with pytest.raises(InputError, match=words):
        stream_generate(*demo, prompt)


def test_ids_are_taken_as_they_are(demo):
    with pytest.raises(InputError, match="taken as it is"):
        stream_generate(*demo, [1, 2], system_prompt="Be brief.")


def test_mistakes_are_found_before_anything_runs(demo):
    with pytest.raises(InputError, match="max_tokens"):
        stream_generate(*demo, PROMPT, max_tokens=0)
    with pytest.raises(InputError, match="seed"):
        stream_generate(*demo, PROMPT, seed=-1)
    with pytest.raises(InputError, match="stop string"):
        stream_generate(*demo, PROMPT, stop=[""])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 4.5}, "max_tokens=4.5 is not possible: use a whole number"),
        ({"max_tokens": "9"}, "max_tokens='9' is not possible: use a whole number"),
        ({"max_denoising_steps": 2.5}, "max_denoising_steps=2.5 is not possible"),
        ({"canvas_length": 8.0}, "canvas_length=8.0 is not possible"),
        ({"temp": "warm"}, "temp='warm' is not possible: use a number"),
        ({"stop": 6}, "stop=6 is not possible: use a string or a list"),
        ({"stop": None}, "stop=None is not possible"),
    ],
)
def test_options_of_the_wrong_type_are_explained(demo, options, words):
    with pytest.raises(InputError, match=words):
        generate(*demo, PROMPT, **options)


def test_missing_and_foreign_models_are_explained(tmp_path):
    with pytest.raises(ModelNotFoundError):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match="no revision v2"):
        load(revision="v2")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type"):
        load(tmp_path)


def test_a_model_that_cannot_fit_is_refused_before_its_weights(monkeypatch):
    this = replace(machine(), memory=20_000_000)
    monkeypatch.setattr("mlx_dgemma.checkpoint.plan.machine", lambda: this)
    monkeypatch.setattr(
        "mlx_dgemma.checkpoint.loading.load_model", lambda *_, **__: pytest.fail("loaded")
    )
    with pytest.raises(ResourceError, match=r"The demo checkpoint needs .* can be used"):
        load()


def test_a_cancelled_request_says_so(demo):
    cancel = threading.Event()
    cancel.set()
    (finish,) = stream_generate(*demo, PROMPT, cancel=cancel, **QUICK)
    assert finish.reason == "cancelled"


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled", "unconverged"])
def test_all_committed_text_arrives_however_a_reply_ends(demo, monkeypatch, reason):
    """What could have begun a stop string was committed, and no later block can take it back."""
    ids = tuple(demo[1].encode("abc"))
    finish = Finish(reason, 1, 1, (1,), (True,), 1.0, 1, len(ids), 0.0, 0.0, 0)

    def one_block(*_):
        yield Commit(ids, "", 0)
        yield finish

    monkeypatch.setattr(import_module("mlx_dgemma.generate"), "generate_blocks", one_block)
    events = list(stream_generate(*demo, PROMPT, stop="cd"))
    assert [event.text for event in events] == ["ab", "c", ""]


def test_a_closed_stream_ends_quietly(demo):
    stream = stream_generate(*demo, PROMPT, drafts=True, **QUICK)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_a_prompt_cache_changes_nothing_but_the_work(demo, tmp_path):
    model, _ = demo
    cache = PromptCache(model)
    first = list(stream_generate(*demo, PROMPT, cache=cache, **QUICK))
    reused = list(stream_generate(*demo, PROMPT, cache=cache, **QUICK))
    assert [e.ids for e in first[:-1]] == [e.ids for e in reused[:-1]]
    assert cache.cache.offset >= len(cache.ids)

    path = tmp_path / "context.safetensors"
    cache.save(path)
    loaded = PromptCache.load(path, model)
    again = list(stream_generate(*demo, PROMPT, cache=loaded, **QUICK))
    assert [e.ids for e in first[:-1]] == [e.ids for e in again[:-1]]


def test_another_prompt_starts_afresh(demo):
    model, tokenizer = demo
    cache = PromptCache(model)
    ids = encode_prompt(tokenizer, PROMPT)
    assert cache.align(ids) == ids
    model.prefill(np.array(ids)[None], cache.cache)
    cache.mark(ids)
    assert cache.align([*ids, 5]) == [5]
    assert cache.align(ids[:-1]) == ids[:-1]
    assert cache.cache.offset == 0


def test_what_is_no_regular_file_is_never_replaced(demo, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="no regular file"):  # before anything runs
        stream_generate(*demo, PROMPT, trace=pipe)
    with pytest.raises(InputError, match="no regular file"):
        PromptCache(demo[0]).save(pipe)
    trace = tmp_path / "trace.json"
    list(stream_generate(*demo, PROMPT, trace=trace, **QUICK))
    with pytest.raises(InputError, match="no regular file"):
        Trace.load(trace).save(pipe)
    assert pipe.is_fifo()


def test_a_replay_takes_the_settings_of_its_trace(demo, tmp_path):
    path = tmp_path / "trace.json"
    options = {"max_denoising_steps": 5, "entropy_bound": 0.5, "t_min": 0.2, "t_max": 0.3}
    prompt = "List 4 animals in alphabetical order, including fox."
    events = list(stream_generate(*demo, prompt, seed=3, max_tokens=20, trace=path, **options))
    assert events[-1].steps_per_block[0] > 2
    again = replay(*demo, path)
    assert again.ids == tuple(token for event in events[:-1] for token in event.ids)
    assert again.divergence is None


def test_the_peak_is_that_of_one_reply(demo):
    large = mx.zeros((200_000_000,), dtype=mx.uint8)
    mx.eval(large)
    del large
    held = mx.get_active_memory()  # by other tests of this process as well
    *_, finish = stream_generate(*demo, PROMPT, **QUICK)
    assert 0 < finish.peak_memory_bytes < held + 200_000_000


def test_the_option_types_follow_the_signature():
    import inspect

    names = set(inspect.signature(stream_generate).parameters)
    positional = {"model", "tokenizer", "prompt", "drafts", "cancel"}
    assert names - positional == set(Options.__annotations__)


def test_generations_do_not_pile_up_memory(demo):
    """50 generations in one process end with the memory of the first."""
    import mlx.core as mx

    options = {**QUICK, "max_tokens": 8, "max_denoising_steps": 1}
    generate(*demo, PROMPT, **options)
    before = mx.get_active_memory()
    for _ in range(50):
        generate(*demo, PROMPT, **options)
    assert mx.get_active_memory() - before < 1_000_000


def test_a_context_in_8_bits(demo, tmp_path):
    """The keyword, the cache that carries it, its file, and a trace that remembers it."""
    model, _ = demo
    trace = tmp_path / "trace.json"
    alone = list(stream_generate(*demo, PROMPT, kv_bits=8, trace=trace, **QUICK))
    cache = PromptCache(model, kv_bits=8)
    for _ in range(2):  # a cache says it for itself
        kept = list(stream_generate(*demo, PROMPT, cache=cache, **QUICK))
        assert [e.ids for e in kept[:-1]] == [e.ids for e in alone[:-1]]
    assert json.loads(trace.read_text())["settings"]["kv_bits"] == 8
    assert replay(*demo, trace).divergence is None

    cache.save(tmp_path / "context")
    assert PromptCache.load(tmp_path / "context", model, 8).cache.kv_bits == 8
    with pytest.raises(CheckpointError, match="holds an 8-bit context"):
        PromptCache.load(tmp_path / "context", model)
    cache.reset()
    assert cache.cache.kv_bits == 8


def test_kv_bits_that_cannot_be(demo):
    model, _ = demo
    with pytest.raises(InputError, match="kv_bits=4 is not possible: use 8"):
        stream_generate(*demo, PROMPT, kv_bits=4)
    with pytest.raises(InputError, match=r"make it with PromptCache\(model, kv_bits=8\)"):
        stream_generate(*demo, PROMPT, kv_bits=8, cache=PromptCache(model))


def test_what_is_computed_in(monkeypatch):
    """float16 and bfloat16 need a GPU, as the experts' product on MLX's CPU backend does."""
    asked = {}

    def loaded(folder, **options):
        asked.update(options)
        return load_model(folder, lazy=True)

    with pytest.raises(InputError, match="dtype='int8' is not possible: use 'float16' or"):
        load(dtype="int8")
    with pytest.raises(InputError, match="dtype='float16' needs a GPU"):
        load(dtype="float16")
    monkeypatch.setattr(loading, "load_model", loaded)
    load(dtype="float32")
    assert asked["dtype"] == mx.float32
    monkeypatch.setattr(loading.mx, "default_device", lambda: mx.Device(mx.gpu))
    load(dtype="float16", lazy=True)
    assert asked["dtype"] == mx.float16
