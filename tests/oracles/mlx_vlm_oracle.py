"""mlx-vlm's DiffusionGemma in float32: the second opinion, published dialect only."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.models.diffusion_gemma import Model, ModelConfig


class VlmReference:
    """One Hugging Face checkpoint folder and one context, driven like our own model."""

    def __init__(self, folder: Path):
        self.model = Model(ModelConfig.from_dict(json.loads((folder / "config.json").read_text())))
        weights = self.model.sanitize(mx.load(str(folder / "model.safetensors")))
        text_only = [item for item in weights.items() if ".vision_tower." not in item[0]]
        self.model.load_weights(text_only, strict=False)
        self.reset()

    def reset(self) -> None:
        self.cache = self.model.make_cache()

    def prefill(self, ids: np.ndarray) -> None:
        self.model.diffusion_prefill_cache(mx.array(ids), cache=self.cache)

    def denoise(
        self, canvas: np.ndarray, self_conditioning_logits: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 logits [1, C, V]."""
        conditioning = None
        if self_conditioning_logits is not None:
            conditioning = mx.array(self_conditioning_logits)
        output = self.model(
            cache=self.cache,
            canvas_ids=mx.array(canvas),
            self_conditioning_logits=conditioning,
        )
        return np.array(output.logits)
