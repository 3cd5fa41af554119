"""mlx-vlm's DiffusionGemma in float32: the second opinion, published dialect only."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.models.diffusion_gemma import Model, ModelConfig


class VlmReference:
    """One Hugging Face checkpoint folder and one context, driven like our own model."""

    def __init__(self, folder: Path, vision: bool = False):
        self.model = Model(ModelConfig.from_dict(json.loads((folder / "config.json").read_text())))
        weights = self.model.sanitize(mx.load(str(folder / "model.safetensors")))
        wanted = [item for item in weights.items() if vision or ".vision_tower." not in item[0]]
        self.model.load_weights(wanted, strict=False)
        self.reset()

    def reset(self) -> None:
        self.cache = self.model.make_cache()

    def prefill(self, ids: np.ndarray, pixels: np.ndarray | None = None) -> None:
        """pixels: one image [1, 3, height, width], behind the prompt's image tokens."""
        is_image = mx.array((ids == self.model.config.image_token_id).astype(np.int32))
        self.model.diffusion_prefill_cache(
            mx.array(ids),
            cache=self.cache,
            pixel_values=None if pixels is None else mx.array(pixels),
            mm_token_type_ids=None if pixels is None else is_image,
        )

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
