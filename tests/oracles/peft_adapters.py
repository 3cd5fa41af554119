"""LoRA adapters made by peft itself: it wraps the model, every LoRA weight is drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers_oracle import Reference

DECODER = r"model\.decoder\.layers\.\d+\."
BOTH = r"model\.(decoder|encoder\.language_model)\.layers\.\d+\."
ENCODER = r"model\.encoder\.language_model\.layers\.\d+\."
LINEAR = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def make_adapter(
    base: Path,
    folder: Path,
    *,
    same_encoder: bool = False,
    zero_encoder: bool = False,
    deviation: float = 0.1,
    **settings: Any,
) -> torch.nn.Module:
    """Saves an adapter of the checkpoint `base` to `folder`; returns the wrapped model, unmerged.

    same_encoder: the encoder's deltas are the decoder's. zero_encoder: they are untrained.
    """
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    wrapped = get_peft_model(model, LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    parameters = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
            elif "lora_" in name:
                parameter.normal_(0.0, deviation)
        for name, parameter in parameters.items():
            if "lora_" in name and "encoder.language_model" in name:
                if same_encoder:
                    twin = name.replace("encoder.language_model", "decoder")
                    parameter.copy_(parameters[twin])
                if zero_encoder and "lora_B" in name:
                    parameter.zero_()
    wrapped.save_pretrained(folder)
    return wrapped


def reference_of(wrapped: torch.nn.Module) -> Reference:
    """The unmerged model as the reference: each delta acts in the module that it was put in."""
    reference = Reference.__new__(Reference)
    reference.model = wrapped.base_model.model
    reference.model.set_experts_implementation("eager")
    reference.router_gaps = []
    reference.reset()
    return reference


def save_as_mlx(wrapped: torch.nn.Module, folder: Path, scale: float) -> None:
    """The decoder's deltas in mlx-lm's form: lora_a [in, r], lora_b [r, out]; experts lora_a
    [E, r, in], lora_b [E, out, r]."""
    import json

    tensors: dict[str, np.ndarray] = {}
    for name, parameter in wrapped.named_parameters():
        if "lora_" not in name or "encoder" in name:
            continue
        module, side = name.removeprefix("base_model.model.").split(".lora_")
        matrix = np.ascontiguousarray(parameter.detach().numpy().T)
        tensors[f"{module}.lora_{side[0].lower()}"] = matrix
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    settings = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": 4, "scale": scale, "dropout": 0.0},
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
