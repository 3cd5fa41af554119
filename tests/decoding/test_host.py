"""What the host does in a step: it reads once, and hands layers over before all are described."""

import time
from functools import partial, partialmethod
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.benchmark.graph import launches
from mlx_dgemma.decoding import (
    active_steps,
    block_result,
    blocks,
    canvas_state,
    denoise,
    prediction,
    report,
    self_conditioning,
)
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.model import masks, network
from mlx_dgemma.model.passes import AHEAD, is_sent

from .driving import drive


@pytest.fixture(scope="module")
def model():
    return load()[0]


def run(model, rows=1, **options):
    """The results of one block after a short context, and how many steps it took."""
    settings = DecodingSettings(max_denoising_steps=8, **options)
    cache = model.make_cache()
    model.prefill(np.arange(60, 90), cache)
    requests = [CanvasRequest(draws=SeededDraws(row)) for row in range(rows)]
    steps, results = drive(denoise.denoise_block(model, cache, settings, requests))
    return results, len(steps)


class CountingNumPy:
    """NumPy, which counts how often an MLX array is read."""

    def __init__(self):
        self.reads = 0

    def array(self, source, *arguments, **keywords):
        self.reads += isinstance(source, mx.array)
        return np.array(source, *arguments, **keywords)

    def __getattr__(self, name):
        return getattr(np, name)


@pytest.mark.parametrize("conditioning", ["dense", "sparse"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("positions", ["all", "active"])
def test_a_step_is_read_once(model, monkeypatch, positions, conditioning, rows):
    """One vector a step, and three where blocks are done; evaluation waits once as well."""
    numpy, waits = CountingNumPy(), []
    core = SimpleNamespace(**vars(mx))
    core.eval = lambda *arrays: (waits.append(1), mx.eval(*arrays))
    for module in (
        active_steps,
        block_result,
        canvas_state,
        denoise,
        prediction,
        report,
        self_conditioning,
    ):
        monkeypatch.setattr(module, "mx", core)
        if hasattr(module, "np"):
            monkeypatch.setattr(module, "np", numpy)
    monkeypatch.setattr(mx.array, "item", lambda _: pytest.fail("a read by item()"))
    monkeypatch.setattr(mx.array, "tolist", lambda _: pytest.fail("a read by tolist()"))
    results, steps = run(
        model, rows, conditioning=conditioning, stability_threshold=99, positions=positions
    )
    assert len(results) == rows
    assert steps == 8
    assert numpy.reads == steps + 3
    assert len(waits) == steps


def test_layers_are_handed_over_while_the_rest_is_described(model, monkeypatch):
    handed = []
    monkeypatch.setattr(
        mx, "async_eval", lambda x: handed.append(x) if isinstance(x, mx.array) else mx.eval(x)
    )
    canvas = mx.zeros((1, model.config.canvas_length), mx.int32)
    layers = model.config.text.num_hidden_layers
    model.hidden(canvas, model.make_cache(), dispatch=True)
    per_step = sum(map(is_sent, range(1, layers + 1)))
    assert len(handed) == per_step > 1
    model.hidden(canvas, model.make_cache())
    assert len(handed) == per_step
    handed.clear()
    model.prefill(np.arange(60, 90), model.make_cache())
    prompt = sum(map(is_sent, range(1, layers)))
    assert len(handed) == prompt > 0
    handed.clear()
    run(model, stability_threshold=99)  # the loop does so by itself
    assert len(handed) == prompt + 8 * per_step


def test_the_first_layers_are_sent_soonest():
    sent = [layers for layers in range(1, 31) if is_sent(layers)]
    assert sent == [1, 3, 7, 15, 23]  # and with layer 30 the head
    assert AHEAD in sent


def test_the_device_works_on_the_next_step_while_the_caller_has_this_one(model):
    """A caller that sleeps uses no processor time, so what the process uses is MLX's."""
    settings = DecodingSettings(max_denoising_steps=4, stability_threshold=99)
    cache = model.make_cache()
    model.prefill(np.arange(60, 90), cache)
    requests = [CanvasRequest(draws=SeededDraws(row)) for row in range(6)]
    used = []
    for _ in denoise.denoise_block(model, cache, settings, requests):
        before = time.process_time()
        time.sleep(0.1)
        used.append(time.process_time() - before)
    *between, last = used
    assert len(between) == 3
    assert min(between) > 0.001 + 10 * last, used  # no step follows the last


def test_a_step_is_decided_and_begun_before_it_is_yielded(model, monkeypatch):
    order = []
    begin = type(model).begin
    monkeypatch.setattr(
        type(model), "begin", lambda *given, **how: (order.append("begun"), begin(*given, **how))[1]
    )
    settings = DecodingSettings(max_denoising_steps=3, stability_threshold=99)
    requests = [CanvasRequest(draws=SeededDraws(0))]
    for _ in denoise.denoise_block(model, model.make_cache(), settings, requests):
        order.append("yielded")
    assert order == ["begun", "yielded", "begun", "yielded", "yielded"]


def test_the_context_is_not_copied_for_the_canvas_after_it(model):
    """It would be if the first step were sent while the committed block is still being read."""
    cache = model.make_cache()
    cache.expect(400)
    settings = DecodingSettings(max_denoising_steps=2, max_tokens=100, empty_reply="allow")
    request = blocks.Request(
        prompt=range(60, 130), settings=settings, draws=SeededDraws(0), seed=0, stop_ids=frozenset()
    )
    places = []
    for _ in blocks.generate_blocks(model, cache, request):
        mx.eval(cache.arrays)
        places.append([np.asarray(buffer).ctypes.data for buffer in cache.arrays])
    assert len(places) > 3
    full = [index for index, layer in enumerate(cache.layers) if layer.window is None]
    assert full
    for index in full:
        assert len({tuple(at[2 * index : 2 * index + 2]) for at in places}) == 1


def test_reading_waits_for_nothing(model, monkeypatch):
    """Ids that lay on the device would be read from behind all the work that is queued there."""
    numpy = CountingNumPy()
    monkeypatch.setattr(network, "np", numpy)
    monkeypatch.setattr(type(model), "prefill", partialmethod(type(model).prefill, chunk_size=32))
    settings = DecodingSettings(max_denoising_steps=1, max_tokens=64, empty_reply="allow")
    request = blocks.Request(
        prompt=range(60, 130), settings=settings, draws=SeededDraws(0), seed=0, stop_ids=frozenset()
    )
    cache = model.make_cache()
    *_, finish = blocks.generate_blocks(model, cache, request)
    assert finish.blocks > 1
    assert cache.offset > 70
    assert numpy.reads == 0


def test_a_draft_asks_nothing_of_the_device(model, monkeypatch):
    cache = model.make_cache()
    model.prefill(np.arange(60, 90), cache)
    requests = [CanvasRequest(draws=SeededDraws(row)) for row in range(2)]
    step = next(denoise.denoise_block(model, cache, DecodingSettings(), requests))
    assert not launches([step.draft, step.accepted, step.entropy])
    expected = np.array(step.draft[1])
    monkeypatch.setattr(mx.array, "__getitem__", lambda *_: pytest.fail("a row of the device's"))
    draft = blocks.draft_event(step, 1)
    assert (draft.ids == expected).all()
    assert draft.accepted.shape == draft.entropy.shape == expected.shape


def test_layers_share_their_masks(model):
    masks._text_mask.cache_clear()
    model.prefill(np.arange(60, 90), model.make_cache())
    assert masks._text_mask.cache_info().misses == 1


def test_handing_over_early_changes_nothing(model, monkeypatch):
    ids = []
    for how in ("not at all", "all", "as it is"):
        with monkeypatch.context() as patch:
            if how == "not at all":
                patch.setattr(denoise, "step", partial(denoise.step, dispatch=False))
                patch.setattr(type(model), "begin", lambda *_, **__: None)
            elif how == "all":
                patch.setattr(network, "is_sent", lambda layers: True)
                patch.setattr(network, "AHEAD", 100)
            (result,), _ = run(model)
        ids.append((result.ids.tolist(), result.entropy.tolist()))
    assert ids[0] == ids[1] == ids[2]
