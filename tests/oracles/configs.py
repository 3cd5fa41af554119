"""A small valid config.json, the published checkpoint's sizes, and where its real files lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_dgemma.benchmark.synthetic import published_config, synthetic_config

FULL, SLIDING = "full_attention", "sliding_attention"
REAL = Path(__file__).parents[3] / "shared" / "assets" / "checkpoint-4bit"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real checkpoint's files are absent")


def config(**text: Any) -> dict[str, Any]:
    """A small valid config in the published dialect."""
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": 12,
        "dtype": "bfloat16",
        "eos_token_id": [1, 7],
        "text_config": {
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "top_k_experts": 3,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "layer_types": [SLIDING, SLIDING, FULL],
            "sliding_window": 16,
            "eos_token_id": 5,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.25,
                },
            },
            **text,
        },
    }


def published_4bit() -> dict[str, Any]:
    """config.json of the published 4-bit repository, as far as shapes and packing go."""
    return {
        **synthetic_config("26b-4bit"),
        "vision_config": published_config()["vision_config"],
    }
