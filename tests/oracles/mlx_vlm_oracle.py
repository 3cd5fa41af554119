"""mlx-vlm's DiffusionGemma in float32: the second opinion, published dialect only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.models.diffusion_gemma import Model, ModelConfig
from transformers_oracle import router_gaps


class VlmReference:
    """One Hugging Face checkpoint folder and one context, driven like our own model."""

    def __init__(self, folder: Path, vision: bool = False):
        self.model = Model(ModelConfig.from_dict(json.loads((folder / "config.json").read_text())))
        weights = self.model.sanitize(mx.load(str(folder / "model.safetensors")))
        wanted = [item for item in weights.items() if vision or ".vision_tower." not in item[0]]
        self.model.load_weights(wanted, strict=False)
        self.router_gaps: list[np.ndarray] = []
        for layer in self.model.layers:
            layer.router.proj = self._watched(layer.router.proj)
            layer.self_attn.rope = self._shifted(layer.self_attn.rope)
        self.reset()

    def reset(self, start: int = 0) -> None:
        """An empty context whose first token has position `start`."""
        self.cache = self.model.make_cache()
        self.start = start

    def prefill(self, ids: np.ndarray, pixels: np.ndarray | None = None) -> None:
        """pixels: one image [1, 3, height, width], after the prompt's image tokens."""
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

    @property
    def smallest_router_gap(self) -> float:
        """Between the last chosen and the first rejected expert, over everything run so far."""
        return float(min(gaps.min() for gaps in self.router_gaps))

    def _watched(self, proj: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        def watched(x: mx.array) -> mx.array:
            scores = proj(x)
            self.router_gaps.extend(router_gaps(np.array(scores), top_k))
            return scores

        top_k = self.model.config.text_config.top_k_experts
        return watched

    def align_sliding_rope(self) -> None:
        """Turn sliding layers by powers made beforehand, as transformers and mlx-vlm's own full
        layers do; `mx.fast.rope` makes them from the base, with other last bits."""
        text = self.model.config.text_config
        theta = text.rope_parameters["sliding_attention"]["rope_theta"]
        periods = theta ** (mx.arange(0, text.head_dim, 2, dtype=mx.float32) / text.head_dim)

        def rope(x: mx.array, offset: int) -> mx.array:
            return mx.fast.rope(
                x,
                text.head_dim,
                traditional=False,
                base=None,
                scale=1.0,
                offset=offset,
                freqs=periods,
            )

        for layer in self.model.layers:
            if layer.layer_type == "sliding_attention":
                layer.self_attn.rope = self._shifted(rope)

    def _shifted(self, rope: Callable[..., mx.array]) -> Callable[..., mx.array]:
        """mlx-vlm takes positions from the cache's length alone, so a start is added here."""
        return lambda x, offset: rope(x, offset=offset + self.start)
