"""The real shapes without a checkpoint at hand: their configs, and files of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.checkpoint.random_weights import random_tensors
from mlx_dgemma.errors import InputError
from mlx_dgemma.model.config import ModelConfig

SLIDING, FULL = "sliding_attention", "full_attention"
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


def write_checkpoint(folder: Path, raw: dict[str, Any], *, seed: int = 0) -> None:
    """The same as a checkpoint folder in the MLX layout.

    A small vision tower comes with it: other runtimes build one for every checkpoint.
    """
    raw = {**raw, "vision_config": _SMALL_TOWER}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = dict(random_tensors(ModelConfig.from_dict(raw), seed=seed))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})


def _quantized(raw: dict[str, Any], recipe: str) -> dict[str, Any]:
    from mlx_dgemma.convert.plan import make_plan
    from mlx_dgemma.convert.recipes import RECIPES
    from mlx_dgemma.convert.source import dense_shapes

    config = ModelConfig.from_dict(raw)
    plan = make_plan(config, raw, dense_shapes(config), RECIPES[recipe], dtype="bfloat16")
    return plan.config
