"""Random weights of real shapes, for timing where no checkpoint is at hand.

The values have the size that keeps activations near one, and nothing more: what such a model says
is noise, so it measures time and memory and never quality.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.checkpoint.weights import fill, settle
from mlx_dgemma.errors import InputError
from mlx_dgemma.model import Model
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.packing import quantization_of
from mlx_dgemma.model.parameters import parameter_shapes

SLIDING, FULL = "sliding_attention", "full_attention"
# Rows of a large random matrix that are drawn; the others repeat them in memory of their own.
_DRAWN_ROWS = 16384
_DRAWN_EXPERTS = 8
_SMALL_TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 32,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
    "standardize": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}


def published_config() -> dict[str, Any]:
    """The sizes of the published checkpoint, as its config.json gives them."""
    layers = 30
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": "bfloat16",
        "canvas_length": 256,
        "image_token_id": 258_880,
        "boi_token_id": 255_999,
        "eoi_token_id": 258_882,
        "eos_token_id": [1, 106, 50],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "dtype": "bfloat16",
            "vocab_size": 262_144,
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "moe_intermediate_size": 704,
            "num_experts": 128,
            "top_k_experts": 8,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "num_global_key_value_heads": 2,
            "global_head_dim": 512,
            "layer_types": [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)],
            "sliding_window": 1024,
            "max_position_embeddings": 262_144,
            "use_bidirectional_attention": "vision",
            "final_logit_softcapping": 30.0,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 1_000_000.0,
                    "partial_rotary_factor": 0.25,
                },
            },
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "dtype": "bfloat16",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 72,
            "global_head_dim": 72,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "position_embedding_size": 10_240,
            "standardize": True,
        },
    }


def medium_config() -> dict[str, Any]:
    """The real vocabulary, canvas and layer pattern on narrow float32 layers, for a CPU."""
    raw = published_config()
    raw["dtype"] = raw["text_config"]["dtype"] = "float32"
    raw["text_config"] |= {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 16,
        "top_k_experts": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
    }
    return with_layers(raw, 6)


def names() -> tuple[str, ...]:
    """The synthetic models there are: the real shapes in any recipe, and one for a CPU."""
    from mlx_dgemma.convert.recipes import RECIPES

    return (*(f"26b-{recipe}" for recipe in RECIPES), "medium")


def synthetic_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a synthetic model, text only; InputError for a name that is none."""
    if name not in names():
        raise InputError(f"There is no synthetic model {name!r}; there are {', '.join(names())}.")
    if name == "medium":
        raw = medium_config()
    else:
        raw = _quantized(published_config(), name.removeprefix("26b-"))
    raw["vision_config"] = None
    if layers is not None:
        most = raw["text_config"]["num_hidden_layers"]
        if not 1 <= layers <= most:
            raise InputError(f"--layers {layers} is not possible: use 1 to {most}.")
        raw = with_layers(raw, layers)
    return raw


def with_layers(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same config with another number of layers; every sixth and the last attend to all."""
    kinds = [FULL if (i + 1) % 6 == 0 or i + 1 == layers else SLIDING for i in range(layers)]
    text = {**raw["text_config"], "num_hidden_layers": layers, "layer_types": kinds}
    return {**raw, "text_config": text}


def synthetic_model(raw: dict[str, Any], *, seed: int = 0) -> Model:
    """A model of these shapes in memory, prepared as a loaded checkpoint is."""
    config = ModelConfig.from_dict(raw)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = mx.float32 if on_cpu else getattr(mx, config.text.dtype)
    model = Model(config, dtype)
    fill(model, dict(random_tensors(config, seed=seed)))
    settle(model)
    return model


def write_checkpoint(folder: Path, raw: dict[str, Any], *, seed: int = 0) -> None:
    """The same as a checkpoint folder in the MLX layout.

    A small vision tower comes with it: other runtimes build one for every checkpoint.
    """
    raw = {**raw, "vision_config": _SMALL_TOWER}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = dict(random_tensors(ModelConfig.from_dict(raw), seed=seed))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})


def random_tensors(config: ModelConfig, *, seed: int = 0) -> Iterator[tuple[str, mx.array]]:
    """Name and value of every tensor of the MLX layout, packed as the config says."""
    key = mx.random.key(seed)
    table = parameter_shapes(config)
    for name, (shape, dtype) in table.items():
        module, _, suffix = name.rpartition(".")
        if suffix in ("scales", "biases") and f"{module}.scales" in table:
            continue  # made with the weight
        key, own = mx.random.split(key)
        if f"{module}.scales" not in table:
            yield name, _random(name, shape, own).astype(getattr(mx, dtype))
            continue
        packing = quantization_of(config.quantization, module)
        assert packing is not None
        dense = (*shape[:-1], shape[-1] * 32 // packing.bits)
        parts = _packed(name, dense, own, getattr(mx, config.text.dtype), packing)
        for part, tensor in zip(("weight", "scales", "biases"), parts, strict=False):
            yield f"{module}.{part}", tensor


def _packed(
    name: str, shape: tuple[int, ...], key: mx.array, dtype: mx.Dtype, packing: Any
) -> tuple[mx.array, ...]:
    drawn = (min(shape[0], _DRAWN_EXPERTS if len(shape) == 3 else _DRAWN_ROWS), *shape[1:])
    dense = _random(name, drawn, key).astype(dtype)
    parts = mx.quantize(dense, packing.group_size, packing.bits, mode=packing.mode)
    return tuple(_repeated(part, shape[0]) for part in parts)


def _random(name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
    if len(shape) < 2:
        return mx.random.uniform(0.9, 1.1, shape, key=key)
    spread = 1.0 if "router" in name else shape[-1] ** -0.5
    drawn = shape
    if prod(shape) > _DRAWN_ROWS * shape[-1]:
        limit = _DRAWN_EXPERTS if len(shape) == 3 else _DRAWN_ROWS
        drawn = (min(shape[0], limit), *shape[1:])
    return _repeated(mx.random.normal(drawn, key=key) * spread, shape[0])


def _repeated(part: mx.array, count: int) -> mx.array:
    times = -(-count // part.shape[0])
    return part if times == 1 else mx.concatenate([part] * times, axis=0)[:count]


def _quantized(raw: dict[str, Any], recipe: str) -> dict[str, Any]:
    from mlx_dgemma.convert.plan import make_plan
    from mlx_dgemma.convert.recipes import RECIPES
    from mlx_dgemma.convert.source import dense_shapes

    config = ModelConfig.from_dict(raw)
    plan = make_plan(config, raw, dense_shapes(config), RECIPES[recipe], dtype="bfloat16")
    return plan.config
