"""Small DiffusionGemma checkpoints with random weights, written by transformers itself.

Every tensor is random, norms and scalars included, so that a forgotten one shows. The two
dialects of config.json describe the same weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
)

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Dims:
    """Sizes of a random checkpoint; odd on purpose, so that no two are equal by chance."""

    vocabulary: int = 97
    hidden: int = 48
    dense: int = 40
    experts: int = 8
    top_k: int = 3
    expert_width: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    full_kv_heads: int = 1
    full_head_dim: int = 32
    layers: tuple[str, ...] = (SLIDING, SLIDING, FULL, SLIDING, FULL)
    window: int = 16
    partial: float = 0.25
    canvas: int = 12
    dtype: str = "float32"
    vision: bool = True
    standardize: bool = True
    clipped: bool = False

    def with_(self, **changes: Any) -> Dims:
        return replace(self, **changes)

    @property
    def image_token(self) -> int:
        return self.vocabulary - 5


def reference_config(dims: Dims) -> DiffusionGemmaConfig:
    """transformers' config object for these sizes."""
    text = {
        "vocab_size": dims.vocabulary,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.dense,
        "num_experts": dims.experts,
        "top_k_experts": dims.top_k,
        "moe_intermediate_size": dims.expert_width,
        "num_hidden_layers": len(dims.layers),
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "global_head_dim": dims.full_head_dim,
        "num_global_key_value_heads": dims.full_kv_heads,
        "layer_types": list(dims.layers),
        "sliding_window": dims.window,
        "max_position_embeddings": 262_144,
        "use_bidirectional_attention": "vision",
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": dims.partial,
            },
        },
    }
    # transformers has no text-only model, so a small tower is always there.
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 64,
        "standardize": dims.standardize,
        "use_clipped_linears": dims.clipped,
    }
    return DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=dims.canvas,
        image_token_id=dims.image_token,
        boi_token_id=dims.vocabulary - 4,
        eoi_token_id=dims.vocabulary - 3,
    )


def write(
    folder: Path,
    dims: Dims = Dims(),
    seed: int = 0,
    dialect: str = "published",
    router_gap: float | None = None,
) -> Path:
    """Write a random checkpoint in Hugging Face's layout.

    dialect: "published" or "saved" (what transformers writes).
    router_gap: make experts nearly tied, with scores about this far apart.
    """
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(reference_config(dims))
    randomize(model, router_gap)
    model.to(getattr(torch, dims.dtype)).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["eos_token_id"] = [1, 7]
    if dialect == "published":
        config = published(config)
    path.write_text(json.dumps(config))
    return folder


def published(config: dict[str, Any]) -> dict[str, Any]:
    """A saved config.json in the published dialect."""
    text = dict(config["text_config"])
    full = next(iter(text.pop("per_layer_config").values()))
    text["global_head_dim"] = full["head_dim"]
    text["num_global_key_value_heads"] = full.get(
        "num_key_value_heads", text["num_key_value_heads"]
    )
    text["final_logit_softcapping"] = 30.0
    vision = json.loads(json.dumps(config["vision_config"]))
    vision["rope_parameters"]["rope_type"] = "default"
    return {**config, "text_config": text, "vision_config": vision}


def randomize(model: torch.nn.Module, router_gap: float | None = None) -> None:
    """Draw every parameter and buffer again, at sizes that keep activations near one."""
    tensors = dict(model.named_parameters()) | {
        name: buffer
        for name, buffer in model.named_buffers()
        if not name.endswith(("inv_freq", "embed_scale"))
    }
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith("layer_scalar"):
                tensor.uniform_(0.4, 1.1)
            elif name.endswith(("_min", "std_bias")):
                tensor.uniform_(-1.6, -0.8)
            elif name.endswith("_max"):
                tensor.uniform_(0.8, 1.6)
            elif tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("router.proj.weight"):
                tensor.normal_(0.0, 1.0)
                if router_gap is not None:
                    near_ties(tensor, router_gap)
            elif "embed_tokens" in name or "lm_head" in name:
                tensor.normal_(0.0, 0.3)
            else:
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5)


def near_ties(proj: torch.Tensor, gap: float) -> None:
    """Make every second expert's row a copy of its neighbour's plus noise of size `gap`."""
    pairs = proj.shape[0] // 2
    noise = torch.randn(pairs, proj.shape[1]).sign() * gap
    proj[1 : 2 * pairs : 2] = proj[0 : 2 * pairs : 2] + noise
