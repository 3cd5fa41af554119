"""A stand-in for google/diffusiongemma-26B-A4B-it: its names and shapes in sparse files.

Holes read as zeros and cost no disk; some layers can be given real (random) numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dgemma.convert.shards import Output, Shard, index_of, plan_shards
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.names import parameter_shapes

SLIDING, FULL = "sliding_attention", "full_attention"


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


def write_sparse(folder: Path, config: dict[str, Any], *, layout: str = "hf") -> list[Shard]:
    """Write config.json, the index and sparse bf16 shards; returns the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    parsed = ModelConfig.from_dict(config)
    shapes = parameter_shapes(parsed, "hf" if layout == "hf" else "mlx", scaled=())
    shards = plan_shards(Output(name, "BF16", shape) for name, (shape, _) in shapes.items())
    for shard in shards:
        header, offset = {}, 0
        for output in shard.outputs:
            header[output.name] = {
                "dtype": output.dtype,
                "shape": list(output.shape),
                "data_offsets": [offset, offset + output.nbytes],
            }
            offset += output.nbytes
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / shard.filename).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_of(shards)))
    return shards


def fill(folder: Path, shards: list[Shard], *prefixes: str, seed: int = 0) -> int:
    """Give the tensors whose names begin with a prefix random bf16 numbers; returns the bytes."""
    generator = np.random.default_rng(seed)
    filled = 0
    for shard in shards:
        with (folder / shard.filename).open("r+b") as file:
            base = 8 + int.from_bytes(file.read(8), "little")
            for output in shard.outputs:
                if output.name.startswith(prefixes):
                    file.seek(base)
                    for start in range(0, output.nbytes, 64 << 20):
                        count = min(64 << 20, output.nbytes - start) // 2
                        file.write(random_bfloat16(generator, count))
                    filled += output.nbytes
                base += output.nbytes
    return filled


def random_bfloat16(generator: np.random.Generator, count: int) -> np.ndarray:
    """Bits of finite bf16 numbers of both signs with magnitudes from 2^-9 to 2^-2."""
    bits = generator.integers(0, 1 << 16, count, dtype=np.uint16)
    exponent = (np.uint16(118) + ((bits >> np.uint16(7)) & np.uint16(7))) << np.uint16(7)
    return (bits & np.uint16(0x807F)) | exponent
