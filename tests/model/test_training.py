"""What training and several machines build on: mlx-lm's tuner, MLX's sharding, gradients."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from configs import config
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from plain_checkpoint import write_plain

import mlx_dgemma.model
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.model.layers import Linear, PackedLinear
from mlx_dgemma.model.parameters import parameter_shapes

DEMO = Path(mlx_dgemma.__file__).parent / "demo" / "checkpoint"
PROMPT = np.arange(60, 90)
CANVAS = mx.arange(100, 132)[None]
CHANGE = 3e-3  # of the loss, near 17, by a finite difference; its resolution is 2e-6
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "head_dim": 32,
    "global_head_dim": 64,
}


@pytest.fixture
def tuned():
    """The demo checkpoint with LoRA layers from mlx-lm's tuner in its last two layers."""
    model = load_model(DEMO, lazy=True, dtype=mx.float32)
    model.freeze()
    mx.random.seed(0)  # the tuner's random matrices
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 8.0, "dropout": 0.0})
    return model


def loss(model: nn.Module) -> mx.array:
    """Of both passes: every prompt position's logits, and a canvas after the prompt."""
    cache = model.make_cache()
    read = model.softcap(model.raw_logits(model.encode(PROMPT, cache)))
    return read.square().mean() + model.denoise(CANVAS, cache).square().mean()


def test_mlx_lms_tuner_finds_every_linear_map_of_the_last_layers(tuned):
    names = [name for name, _ in tree_flatten(tuned.trainable_parameters())]
    count = tuned.config.text.num_hidden_layers
    assert {name.split(".")[3] for name in names} == {str(count - 2), str(count - 1)}
    adapted = {name.rsplit(".", 1)[0].split(".", 4)[4] for name in names}
    assert adapted == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        "router.proj",
    }


def test_an_untrained_delta_changes_nothing(tuned):
    plain = load_model(DEMO, lazy=True, dtype=mx.float32)
    assert mx.array_equal(loss(tuned), loss(plain))
    tuned.prepare()  # joins what is still plain, and leaves LoRA layers alone
    assert "q_proj" in tuned.layers[-2].self_attn
    assert "qkv_proj" in tuned.layers[0].self_attn
    assert mx.allclose(loss(tuned), loss(plain), rtol=1e-4)


def test_gradients_of_both_passes_are_those_of_finite_differences(tuned):
    _, gradients = nn.value_and_grad(tuned, loss)(tuned)
    found = dict(tree_flatten(gradients))
    trained = dict(tree_flatten(tuned.trainable_parameters()))
    assert set(found) == set(trained)
    # lora_b starts at zero, so lora_a has no gradient yet
    names = [name for name in found if name.endswith("lora_b")]
    assert all(mx.abs(found[name]).max().item() > 0 for name in names if "router" not in name)
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        key = f"model.decoder.layers.{tuned.config.text.num_hidden_layers - 2}.{name}.lora_b"
        gradient, before = found[key], trained[key]
        length = mx.sqrt(gradient.square().sum()).item()
        step = CHANGE / length**2
        ends = []
        for sign in (1, -1):
            tuned.load_weights([(key, before + sign * step * gradient)], strict=False)
            ends.append(loss(tuned).item())
        tuned.load_weights([(key, before)], strict=False)
        assert (ends[0] - ends[1]) / 2 == pytest.approx(CHANGE, rel=0.05)


def test_a_training_step_lowers_the_loss(tuned):
    before, gradients = nn.value_and_grad(tuned, loss)(tuned)
    rate = 1e-4
    trained = dict(tree_flatten(tuned.trainable_parameters()))
    moved = [(name, trained[name] - rate * g) for name, g in tree_flatten(gradients)]
    tuned.load_weights(moved, strict=False)
    assert loss(tuned).item() < before.item()


def test_encode_extends_the_context_as_prefill_does():
    model = load_model(DEMO, dtype=mx.float32)
    one, two = model.make_cache(), model.make_cache()
    hidden = model.encode(PROMPT, one)
    model.prefill(PROMPT, two)
    assert hidden.shape == (1, len(PROMPT), model.config.text.hidden_size)
    assert one.offset == two.offset == len(PROMPT)
    for mine, other in zip(one.arrays, two.arrays, strict=True):
        assert mx.array_equal(mine, other)
    logits = model.softcap(model.raw_logits(hidden))
    assert logits.shape == (1, len(PROMPT), model.config.text.vocab_size)
    assert logits.dtype == mx.float32
    # causal: a prefix gives the same hidden states
    prefix = model.encode(PROMPT[:10], model.make_cache())
    assert mx.abs(prefix - hidden[:, :10]).max().item() < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_linear_maps_shard_as_mlx_shards_its_own(tmp_path, packed):
    values = config(**WIDE)
    if packed:
        values |= {"quantization": {"group_size": 32, "bits": 4}}
    model = load_model(write_plain(tmp_path, values), lazy=True, dtype=mx.float32)
    projection = model.layers[0].mlp.up_proj
    assert isinstance(projection, PackedLinear if packed else Linear)
    x = mx.random.normal((3, 64), key=mx.random.key(0))
    for sharding in ("all-to-sharded", "sharded-to-all"):
        sharded = shard_linear(projection, sharding, group=mx.distributed.init())
        assert mx.allclose(sharded(x), projection(x), atol=1e-5)


def test_packed_maps_say_their_bits_and_adapt(tmp_path):
    values = config(**WIDE) | {"quantization": {"group_size": 32, "bits": 4}}
    model = load_model(write_plain(tmp_path, values), lazy=True, dtype=mx.float32)
    projection = model.layers[0].self_attn.q_proj
    assert (projection.bits, projection.group_size, projection.mode) == (4, 32, "affine")
    assert (projection.inputs, projection.outputs) == (64, projection.weight.shape[0])
    lora = projection.to_lora(r=2, scale=1.0)
    x = mx.random.normal((3, 64), key=mx.random.key(0))
    assert mx.array_equal(lora(x), projection(x))  # lora_b is zero
    lora.lora_b = mx.ones_like(lora.lora_b)
    assert not mx.allclose(lora(x), projection(x))
    assert not tree_flatten(projection.trainable_parameters())  # codes have no gradient


def test_the_modules_declare_what_the_table_says(tmp_path):
    """Names and shapes stand in one place: the modules' own declarations."""
    model = load_model(write_plain(tmp_path), lazy=True)
    declared = mlx_dgemma.model.Model(model.config)
    shapes = {name: tuple(t.shape) for name, t in tree_flatten(declared.parameters())}
    assert shapes == {name: shape for name, (shape, _) in parameter_shapes(model.config).items()}
