"""The parameter table against the real index, and the network's tree against the table."""

import json
import math

import pytest
from configs import REAL, config, needs_real, published_4bit
from mlx.utils import tree_flatten
from plain_checkpoint import write_plain

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.model import ModelConfig
from mlx_dgemma.model.packing import quantization_of
from mlx_dgemma.model.parameters import parameter_shapes

BYTES = {"bfloat16": 2, "float32": 4, "uint32": 4, "uint8": 1}


def size(entry):
    shape, dtype = entry
    return math.prod(shape) * BYTES[dtype]


def test_the_published_shapes():
    table = parameter_shapes(ModelConfig.from_dict(published_4bit()))
    assert len(table) == 1647
    assert sum(map(size, table.values())) == 16_542_844_632
    full_layers = {layer for layer in range(30) if (layer + 1) % 6 == 0}
    value = "model.decoder.layers.{}.self_attn.v_proj.weight"
    assert {layer for layer in range(30) if value.format(layer) not in table} == full_layers


@needs_real
def test_the_published_shapes_are_those_of_the_real_files():
    real = parameter_shapes(ModelConfig.from_folder(REAL))
    published = parameter_shapes(ModelConfig.from_dict(published_4bit()))
    assert list(published.items()) == list(real.items())


@needs_real
def test_the_real_four_bit_repository():
    index = json.loads((REAL / "model.safetensors.index.json").read_text())
    table = parameter_shapes(ModelConfig.from_folder(REAL))
    assert len(table) == 1647
    assert set(table) == set(index["weight_map"])
    assert sum(map(size, table.values())) == index["metadata"]["total_size"] == 16_542_844_632


@needs_real
def test_tree_order_gives_the_published_shards():
    index = json.loads((REAL / "model.safetensors.index.json").read_text())
    shard, filled = 1, 0
    for name, entry in parameter_shapes(ModelConfig.from_folder(REAL)).items():
        if filled + size(entry) > 5 << 30:
            shard, filled = shard + 1, 0
        filled += size(entry)
        assert index["weight_map"][name] == f"model-{shard:05d}-of-00004.safetensors"


def test_hugging_face_layout_has_bare_experts():
    table = parameter_shapes(ModelConfig.from_dict(config()), "hf")
    assert table["model.decoder.layers.1.experts.gate_up_proj"] == ((8, 48, 48), "bfloat16")
    assert "model.decoder.layers.1.self_attn.v_proj.weight" in table
    assert "model.decoder.layers.2.self_attn.v_proj.weight" not in table  # a full layer
    assert not any(name.endswith("experts.down_proj.weight") for name in table)


def test_an_override_without_mode_means_affine():
    quantization = {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
        "a": {"group_size": 64, "bits": 8},
        "b": False,
    }
    assert quantization_of(quantization, "a").mode == "affine"
    assert quantization_of(quantization, "b") is None
    assert quantization_of(quantization, "c").mode == "mxfp4"
    assert quantization_of(None, "a") is None


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_only_affine_has_biases(mode):
    group = {"affine": 32, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}[mode]
    values = config(hidden_size=64) | {
        "quantization": {"group_size": group, "bits": 8 if mode == "mxfp8" else 4, "mode": mode}
    }
    table = parameter_shapes(ModelConfig.from_dict(values))
    scales = table["model.decoder.embed_tokens.scales"]
    assert scales == ((97, 64 // group), "bfloat16" if mode == "affine" else "uint8")
    assert ("model.decoder.embed_tokens.biases" in table) == (mode == "affine")


def test_the_lazy_tree_is_the_table(tmp_path):
    model = load_model(write_plain(tmp_path), lazy=True)
    tree = dict(tree_flatten(model.parameters()))
    table = parameter_shapes(model.config)
    assert {name: tuple(tensor.shape) for name, tensor in tree.items()} == {
        name: shape for name, (shape, _) in table.items()
    }
