"""Images through the public functions, on the bundled demo; what it answers is tested elsewhere."""

from __future__ import annotations

import threading
from dataclasses import replace
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma import Finish, PromptCache, Runtime, generate, infill, load, stream_generate
from mlx_dgemma.errors import InputError
from mlx_dgemma.generate import prepare_prompt
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.machine.memory import is_short, usable
from tests.prompt.drawings import photograph

QUESTION = "What is in the picture?"
QUICK = {"max_denoising_steps": 2, "max_tokens": 8, "seed": 4}


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture
def encoded(demo, monkeypatch):
    """The pictures that go through the vision tower, in order."""
    model, _ = demo
    seen = []
    encode = model.image_features

    def watched(image):
        seen.append(image.pixels)
        return encode(image)

    monkeypatch.setattr(model, "image_features", watched)
    return seen


def committed(stream):
    return [event.ids for event in stream if not isinstance(event, Finish)]


def ask(picture, *more):
    part = {"type": "image", "image": picture}
    text = {"type": "text", "text": QUESTION}
    return [{"role": "user", "content": [part, text]}, *more]


def test_a_picture_is_part_of_the_prompt(demo, encoded):
    picture = photograph(128, 128, 10)
    *_, finish = stream_generate(*demo, QUESTION, images=[picture], **QUICK)
    prompt = prepare_prompt(*demo, ask(picture))
    assert finish.prompt_tokens == len(prompt.ids)
    assert prompt.images[0].soft_tokens < len(prompt.ids)
    assert len(encoded) == 1
    np.testing.assert_array_equal(encoded[0], prompt.images[0].patches.pixels)


def test_the_context_depends_on_the_picture(demo):
    model, _ = demo
    contexts = []
    for seed in (11, 12):
        prompt = prepare_prompt(*demo, ask(photograph(128, 128, seed)))
        cache = model.make_cache()
        network = prompt.network_ids(model.config.image_token_id)
        model.prefill(network, cache, [image.patches for image in prompt.images])
        contexts.append(np.array(cache.layers[-1].visible()[0][0]))
    assert contexts[0].shape == contexts[1].shape
    assert np.abs(contexts[0] - contexts[1]).max() > 1e-3


def test_equal_pictures_are_encoded_once(demo, encoded):
    picture = photograph(64, 64, 13)
    generate(*demo, QUESTION, images=[picture, photograph(64, 64, 14), picture.copy()], **QUICK)
    assert len(encoded) == 2
    generate(*demo, "And now?", images=[picture], **QUICK)
    assert len(encoded) == 2


def test_a_conversation_reads_its_pictures_once(demo, encoded):
    model, _ = demo
    cache = PromptCache(model)
    first = ask(photograph(64, 64, 15))
    alone = committed(stream_generate(*demo, first, **QUICK))
    assert committed(stream_generate(*demo, first, cache=cache, **QUICK)) == alone
    model._seen.clear()
    more = [
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
    ]
    second = photograph(40, 64, 16)
    encoded.clear()
    cached = committed(stream_generate(*demo, first + more, images=[second], cache=cache, **QUICK))
    assert len(encoded) == 1  # the second picture alone
    fresh = committed(stream_generate(*demo, first + more, images=[second], **QUICK))
    assert cached == fresh


def test_another_picture_is_another_context(demo, tmp_path):
    """All pictures have the same placeholder ids; their content must tell them apart."""
    model, _ = demo
    one, other = photograph(64, 64, 17), photograph(64, 64, 18)
    cache = PromptCache(model)
    list(stream_generate(*demo, ask(one), cache=cache, **QUICK))
    reused = committed(stream_generate(*demo, ask(other), cache=cache, **QUICK))
    assert cache.ids == prepare_prompt(*demo, ask(other)).keys
    assert reused == committed(stream_generate(*demo, ask(other), **QUICK))

    path = tmp_path / "context.safetensors"
    cache.save(path)
    loaded = PromptCache.load(path, model)
    assert loaded.align(prepare_prompt(*demo, ask(other)).keys) == []
    keys = prepare_prompt(*demo, ask(one)).keys
    assert loaded.align(keys) == keys


def test_the_cache_of_pictures_has_a_budget():
    from mlx_dgemma.model.vision import FeatureCache, ImagePatches

    cache, seen = FeatureCache(budget_bytes=2 * 4 * 8), []

    def encode(image):
        seen.append(int(image.pixels[0, 0]))
        return mx.zeros((1, 8), mx.float32)

    def get(value):
        cache.get(ImagePatches(np.full((1, 3), value), np.zeros((1, 2), int)), encode)

    for value in (1, 2, 1, 3, 1, 2):
        get(value)
    assert seen == [1, 2, 3, 2]  # 2 was used longest ago when 3 came


def test_the_tower_is_released_when_memory_is_short(demo, encoded, monkeypatch):
    model, _ = demo
    picture = photograph(64, 64, 22)
    ample = generate(*demo, QUESTION, images=[picture], **QUICK)
    tower = model.model.encoder.vision_tower
    released = []
    reread = model.reread_vision
    monkeypatch.setattr(model, "reread_vision", lambda own: released.append(reread(own)))
    generate(*demo, QUESTION, images=[photograph(64, 64, 23)], **QUICK)
    assert released == []  # this machine has room
    monkeypatch.setattr(import_module("mlx_dgemma.generate"), "is_short", lambda *_: True)
    before = mx.get_active_memory()
    generate(*demo, QUESTION, images=[photograph(64, 64, 24)], **QUICK)
    assert len(released) == 1
    held = sum(array.nbytes for _, array in tree_flatten(tower.parameters()))
    assert mx.get_active_memory() < before - held // 2  # its weights are unread again
    model._seen.clear()
    assert generate(*demo, QUESTION, images=[picture], **QUICK) == ample


def test_a_dropped_model_goes_at_once():
    """Not only when Python next looks for circles: a model may fill the machine."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        model, _ = load()
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_what_counts_as_short():
    here = machine()
    room = usable(here)
    assert not is_short(replace(here, metal=False), 0)
    assert is_short(replace(here, metal=False), room + 1)
    assert is_short(replace(here, metal=True, wired_limit=1), 1 << 20)
    assert not is_short(replace(here, memory=None), room + 1)


def test_a_cancelled_prompt_is_not_read(demo, encoded):
    cancel = threading.Event()
    cancel.set()
    cache = PromptCache(demo[0])
    stream = stream_generate(
        *demo, QUESTION, images=[photograph(64, 64, 19)], cancel=cancel, cache=cache, **QUICK
    )
    assert [event.reason for event in stream] == ["cancelled"]
    assert cache.ids == []
    assert encoded == []


def test_a_trace_has_no_room_for_pictures(demo, tmp_path):
    with pytest.raises(InputError, match="text alone"):
        stream_generate(*demo, QUESTION, images=[photograph(9, 9)], trace=tmp_path / "t", **QUICK)


def test_pictures_in_a_runtime_and_behind_a_hole(demo, encoded):
    picture = photograph(64, 64, 20)
    with Runtime() as runtime:
        expected = generate(*demo, QUESTION, images=[picture], **QUICK)
        assert runtime.generate(QUESTION, images=[picture], **QUICK) == expected
    assert len(encoded) == 1
    options = {"prompt": QUESTION, "seed": 1, "max_denoising_steps": 2}
    assert infill(*demo, "A <hole:1> dog", images=[photograph(64, 64, 21)], **options).fillings
    assert len(encoded) == 2
