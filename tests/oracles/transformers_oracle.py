"""transformers' DiffusionGemma in float32, eager attention, dynamic cache: the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers.utils import logging

logging.disable_progress_bar()


class Reference:
    """One checkpoint and one context, driven like our own model."""

    def __init__(self, folder: Path):
        self.model = DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.model.set_experts_implementation("eager")
        self.router_gaps: list[np.ndarray] = []
        network = self.model.model
        for layer in (*network.encoder.language_model.layers, *network.decoder.layers):
            layer.router.proj.register_forward_hook(self._watch_router)
        self.reset()

    def reset(self, start: int = 0) -> None:
        """An empty context whose first token has position `start`."""
        self.cache = DynamicCache(config=self.model.config.text_config)
        self.position = start
        self.image_mask = np.zeros(0, dtype=bool)

    @torch.no_grad()
    def prefill(self, ids: np.ndarray) -> None:
        """Extend the context by ids int [1, S], in one pass."""
        tokens = torch.tensor(np.asarray(ids), dtype=torch.long)
        self.model.model.encoder(
            input_ids=tokens,
            past_key_values=self.cache,
            position_ids=self._positions(tokens.shape[1]),
        )
        self._note_types(np.asarray(ids), images=False)
        self.position += tokens.shape[1]

    @torch.no_grad()
    def denoise(
        self, canvas: np.ndarray, self_conditioning_logits: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 logits [1, C, V]."""
        tokens = torch.tensor(np.asarray(canvas), dtype=torch.long)
        conditioning = None
        if self_conditioning_logits is not None:
            conditioning = torch.tensor(np.asarray(self_conditioning_logits))
        return self.model(
            past_key_values=self.cache,
            decoder_input_ids=tokens,
            decoder_position_ids=self._positions(tokens.shape[1]),
            self_conditioning_logits=conditioning,
        ).logits.numpy()

    @torch.no_grad()
    def prefill_with_images(
        self, ids: np.ndarray, pixels: np.ndarray, positions: np.ndarray
    ) -> None:
        """Extend the context by a prompt with images.

        pixels [images, patches, values], positions [images, patches, 2]. The masks are made the
        way `generate` makes them: the forward pass alone builds the image mask and drops it.
        The mask looks token types up by absolute position, so they cover the cached tokens too.
        """
        self._note_types(np.asarray(ids), images=True)
        tokens = torch.tensor(np.asarray(ids), dtype=torch.long)
        encoder = self.model.model.encoder
        embedded = encoder.get_input_embeddings()(tokens)
        places = self._positions(tokens.shape[1])
        masks = encoder.create_masks_for_generate(
            config=self.model.config.text_config,
            inputs_embeds=embedded,
            attention_mask=None,
            past_key_values=self.cache,
            position_ids=places,
            mm_token_type_ids=torch.tensor(self.image_mask[None]).long(),
        )
        encoder(
            input_ids=tokens,
            attention_mask=masks,
            past_key_values=self.cache,
            position_ids=places,
            pixel_values=torch.tensor(pixels),
            image_position_ids=torch.tensor(positions),
        )
        self.position += tokens.shape[1]

    @torch.no_grad()
    def image_features(self, pixels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Soft tokens [tokens, H] of images, one after the other."""
        features = self.model.model.encoder.get_image_features(
            torch.tensor(pixels), torch.tensor(positions), return_dict=True
        )
        return features.pooler_output.numpy()

    @property
    def smallest_router_gap(self) -> float:
        """Between the last chosen and the first rejected expert, over everything run so far."""
        return float(min(gaps.min() for gaps in self.router_gaps))

    def _note_types(self, ids: np.ndarray, images: bool) -> None:
        is_image = (ids[0] == self.model.config.image_token_id) & images
        self.image_mask = np.concatenate([self.image_mask, is_image])

    def _positions(self, count: int) -> torch.Tensor:
        return torch.arange(self.position, self.position + count)[None]

    def _watch_router(self, _module: object, _inputs: object, scores: torch.Tensor) -> None:
        top_k = self.model.config.text_config.top_k_experts
        self.router_gaps.extend(router_gaps(scores.numpy(), top_k))


def router_gaps(scores: np.ndarray, top_k: int) -> list[np.ndarray]:
    """Between the last chosen and the first rejected expert; empty where none is rejected."""
    if top_k >= scores.shape[-1]:
        return []
    best = np.sort(scores.reshape(-1, scores.shape[-1]), axis=-1)
    return [best[:, -top_k] - best[:, -top_k - 1]]


def assert_close(ours: object, reference: np.ndarray, tolerance: float = 1e-4) -> float:
    """The project's parity rule; returns the relative error.

    max|ours - ref| / max|ref| below the tolerance, and the same argmax wherever the reference's
    two best are more than 1e-3 apart.
    """
    ours = np.array(ours, dtype=np.float32)
    assert ours.shape == reference.shape
    error = float(np.abs(ours - reference).max() / np.abs(reference).max())
    assert error < tolerance, f"relative error {error:.2e}"
    best = np.sort(reference, axis=-1)
    clear = best[..., -1] - best[..., -2] > 1e-3
    assert (ours.argmax(-1) == reference.argmax(-1))[clear].all()
    return error
