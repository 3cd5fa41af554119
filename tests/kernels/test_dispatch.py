"""The program's own calls reach the kernels, and a block comes out the same as from the twins."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from harness import emulated, emulator_only

from mlx_dgemma import load, stream_generate
from mlx_dgemma.benchmark.synthetic import published_config
from mlx_dgemma.kernels import (
    Matrix,
    gather_soft_embeddings,
    row_statistics,
    select_survivors,
)
from mlx_dgemma.kernels.row_statistics import SLICE
from mlx_dgemma.model import attention as network_attention
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.packed_context import PackedLayerContext
from mlx_dgemma.model.vision import VisionAttention

pytestmark = emulator_only


def committed(model, tokenizer):
    events = stream_generate(
        model, tokenizer, "Count from 3 to 9.", max_tokens=32, max_denoising_steps=3, seed=7
    )
    return [tuple(int(i) for i in event.ids) for event in events if hasattr(event, "block")]


@pytest.mark.parametrize("setting", ["checked", "greedy"])
def test_a_block_of_the_demo_checkpoint_has_the_same_ids(setting, monkeypatch):
    model, tokenizer = load()
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "off")
    expected = committed(model, tokenizer)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "force")
    with emulated(setting) as launched:
        found = committed(model, tokenizer)
    assert found == expected
    assert expected
    names = {launch.body.name.removeprefix("dgemma_") for launch in launched}
    assert names >= {
        "row_statistics",
        "accept",
        "top_experts",
        "sort_by_expert",
        "experts",
        "combine",
    }


def test_sparse_soft_embeddings_take_both_kernels(monkeypatch):
    raw = mx.random.normal((4, 300)) * 20
    log_z = row_statistics(raw, 0.8, mx.zeros((4, 2))).log_z
    table = Matrix(mx.random.normal((300, 64)))
    few = select_survivors(raw, log_z, 0.8, mx.float32)
    counts = np.array(few.counts)
    expected = gather_soft_embeddings(few, table, counts)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "force")
    with emulated() as launched:
        survivors = select_survivors(raw, log_z, 0.8, mx.float32)
        found = gather_soft_embeddings(survivors, table, counts)
    assert [launch.body.name for launch in launched] == [
        "dgemma_survivors",
        "dgemma_gather_embeddings",
    ]
    assert mx.allclose(found, expected, atol=1e-4).item()


def test_a_long_context_takes_the_attention_kernels(monkeypatch):
    """A canvas after more keys than a chunk, through the network's own attention."""
    monkeypatch.setattr(network_attention, "KEY_CHUNK", 16)
    queries, (keys, values) = mx.random.normal((1, 4, 5, 16)), mx.random.normal((2, 1, 2, 40, 16))
    expected = network_attention.attend(queries, [(keys, values)])
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "force")
    with emulated() as launched:
        found = network_attention.attend(queries, [(keys, values)])
    names = [launch.body.name for launch in launched]
    assert names == ["dgemma_chunk_softmax", "dgemma_merge_attention"] * 3
    assert mx.allclose(found, expected, atol=1e-5).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_a_picture_is_attended_to_at_once(monkeypatch, dtype):
    """The published tower's attention, 72 wide, through MLX's own kernel and by the twin."""
    config = ModelConfig.from_dict(published_config()).vision
    attention = VisionAttention(config)
    draw = partial(mx.random.normal, dtype=dtype)
    attention.apply(lambda tensor: draw(tensor.shape) * tensor.shape[-1] ** -0.5)
    x = draw((1, 30, config.hidden_size))
    angles = mx.arange(30 * 18).reshape(30, 18) / 40
    rope = ((mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype)),) * 2
    asked = []
    real = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda *given, **how: (asked.append(given[0].shape), real(*given, **how))[1],
    )
    expected = attention(x, rope)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "force")
    assert asked == []
    with emulated():
        found = attention(x, rope)
    assert asked == [(1, 16, 30, 72)]
    bound = 1e-4 if dtype == mx.float32 else 5e-3
    assert mx.abs(found - expected).max().item() < bound * mx.abs(expected).max().item()


def test_what_a_kernel_does_not_take_goes_to_its_twin(monkeypatch):
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "force")
    wide = mx.zeros((2, 32 * SLICE + 1))
    with emulated() as launched:
        assert row_statistics(wide, 0.8, mx.zeros((2, 2))).argmax.tolist() == [0, 0]
    assert launched == []


def test_off_means_off(monkeypatch):
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "off")
    with emulated() as launched:
        row_statistics(mx.zeros((2, 40)), 0.8, mx.zeros((2, 2)))
    assert launched == []


def test_a_packed_context_takes_the_attention_kernels(monkeypatch):
    """Its chunks, unpacked one after the other, and the canvas after them as it is."""
    monkeypatch.setattr(network_attention, "KEY_CHUNK", 16)
    queries, own = mx.random.normal((2, 4, 5, 32)), mx.random.normal((2, 2, 2, 5, 32))
    layer = PackedLayerContext(16)
    layer.append(*mx.random.normal((2, 1, 2, 40, 32)))
    segments = [*layer.visible(), (own[0], own[1])]
    mask = mx.arange(5)[None, :] <= mx.arange(5)[:, None]
    expected = network_attention.attend(queries, segments, mask)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "force")
    with emulated() as launched:
        found = network_attention.attend(queries, segments, mask)
    names = [launch.body.name for launch in launched]
    assert names == ["dgemma_chunk_softmax", "dgemma_merge_attention"] * 4
    assert mx.allclose(found, expected, atol=1e-5).item()
