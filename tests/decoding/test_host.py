"""What the host does in a step: it reads once, and hands layers over before all are described."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.decoding import denoise
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings

from .driving import drive


@pytest.fixture(scope="module")
def model():
    return load()[0]


def run(model, rows=1, **options):
    """The results of one block behind a short context, and how many steps it took."""
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
def test_a_step_is_read_once(model, monkeypatch, conditioning, rows):
    """One vector a step, and three a row when its block is done; evaluation waits once as well."""
    numpy, waits = CountingNumPy(), []
    core = SimpleNamespace(**vars(mx))
    core.eval = lambda *arrays: (waits.append(1), mx.eval(*arrays))
    monkeypatch.setattr(denoise, "np", numpy)
    monkeypatch.setattr(denoise, "mx", core)
    monkeypatch.setattr(mx.array, "item", lambda _: pytest.fail("a read by item()"))
    monkeypatch.setattr(mx.array, "tolist", lambda _: pytest.fail("a read by tolist()"))
    results, steps = run(model, rows, conditioning=conditioning, stability_threshold=99)
    assert len(results) == rows
    assert steps == 8
    assert numpy.reads == steps + 3 * rows
    assert len(waits) == steps


def test_layers_are_handed_over_while_the_rest_is_described(model, monkeypatch):
    handed = []
    monkeypatch.setattr(
        mx, "async_eval", lambda x: handed.append(x) if isinstance(x, mx.array) else mx.eval(x)
    )
    canvas = mx.zeros((1, model.config.canvas_length), mx.int32)
    model.hidden(canvas, model.make_cache(), dispatch_every=2)
    assert len(handed) == model.config.text.num_hidden_layers // 2
    model.hidden(canvas, model.make_cache())
    assert len(handed) == model.config.text.num_hidden_layers // 2
    run(model, stability_threshold=99)  # the loop does so by itself
    per_step = model.config.text.num_hidden_layers // denoise.DISPATCH_EVERY
    assert len(handed) == model.config.text.num_hidden_layers // 2 + 8 * per_step


def test_handing_over_early_changes_nothing(model, monkeypatch):
    ids = []
    for every in (None, 1, denoise.DISPATCH_EVERY):
        monkeypatch.setattr(denoise, "DISPATCH_EVERY", every)
        (result,), _ = run(model)
        ids.append((result.ids.tolist(), result.entropy.tolist()))
    assert ids[0] == ids[1] == ids[2]
