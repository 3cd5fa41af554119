"""What is checked before a model is loaded is what its passes then ask for."""

from __future__ import annotations

from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import generate, load
from mlx_dgemma.benchmark.synthetic import synthetic_config
from mlx_dgemma.checkpoint import loading
from mlx_dgemma.checkpoint.weights import fill
from mlx_dgemma.decoding.logits import WholeLogits
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.kernels import accept_renoise, dispatch, gather_soft_embeddings
from mlx_dgemma.kernels.table import operations
from mlx_dgemma.model import Model
from mlx_dgemma.model import attention as network_attention
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.kernel_shapes import kernel_shapes
from mlx_dgemma.model.parameters import parameter_shapes


def classes(requests):
    return {(one.name, *dispatch.shape_class(shape).items()) for one, shape in requests}


# Operations that a reply without a picture does not ask for.
FOR_PICTURES = {"fused_attention"}


@contextmanager
def recorded(monkeypatch):
    """The (operation, shape) that the passes ask for; all are answered by twins."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "use", lambda one, *sizes: asked.append((one, one.shape(*sizes))))
        yield asked


def test_a_reply_of_the_demo_asks_for_nothing_else(monkeypatch):
    model, tokenizer = load()
    monkeypatch.setattr(network_attention, "KEY_CHUNK", 48)
    with recorded(monkeypatch) as asked:
        for prompt in ("Count from 3 to 9.", "What is three plus four? " * 20):
            generate(model, tokenizer, prompt, seed=1, max_tokens=40, conditioning="sparse")
    planned = {(name, *filter(_not_chunk, sizes)) for name, *sizes in _plan(model, "float32")}
    found = {(name, *filter(_not_chunk, sizes)) for name, *sizes in classes(asked)}
    assert found <= planned, found - planned
    assert {name for name, *_ in found} == set(operations()) - FOR_PICTURES


def _not_chunk(size):
    return size[0] != "chunk"


def _plan(model, dtype):
    # In float32 on a CPU the demo is dense.
    return classes(kernel_shapes(model.config, dtype))


@pytest.mark.parametrize("layout", ["4bit", "8bit", "mxfp4", "bf16"])
def test_the_published_layouts_ask_for_what_is_planned(layout, monkeypatch):
    """Graphs of zeros are built and never computed."""
    config = ModelConfig.from_dict(synthetic_config(f"26b-{layout}"))
    model = Model(config, mx.bfloat16)
    shapes = parameter_shapes(config)
    fill(
        model, {name: mx.zeros(shape, getattr(mx, kind)) for name, (shape, kind) in shapes.items()}
    )
    cache, length = model.make_cache(), config.canvas_length
    with recorded(monkeypatch) as asked, monkeypatch.context() as patch:
        for name in ("eval", "async_eval"):
            patch.setattr(mx, name, lambda *_: None)
        for tokens in (2048, 2048, 700, 50, 20):
            model.prefill(np.zeros(tokens, np.int32), cache)
        canvas = mx.zeros((1, length), mx.int32)
        logits = WholeLogits(model, model.hidden(canvas, cache)[0], np.zeros(0, np.int32))
        stats = logits.statistics(0.8, mx.zeros((length, 2)), 1.0)
        counts = np.ones(length, int)
        gather_soft_embeddings(logits.survivors(stats, 0.8), model.embedding_matrix, counts)
        drafts = (stats.argmax[None], stats.sample[None])
        accept_renoise(canvas, stats.entropy[None], *drafts, canvas, None, 0.1)
    found = classes(asked)
    planned = classes(kernel_shapes(config))
    assert found <= planned, found - planned
    assert {name for name, *_ in found} == set(operations()) - FOR_PICTURES
    assert len(found) > 0.6 * len(planned)


def test_a_model_is_loaded_after_its_kernels_are_checked(monkeypatch):
    order = []
    monkeypatch.setattr(dispatch, "prepare", lambda requests: order.append(len(requests)))
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: order.append("weights"))
    loading.load_network()
    assert order == [len(kernel_shapes(ModelConfig.from_folder(CHECKPOINT))), "weights"]
    order.clear()
    loading.load_network(lazy=True)
    assert order == ["weights"]
