"""Which way a step's self-conditioning is summed: over survivors only where they are nearly all."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.decoding import denoise, self_conditioning
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.generate import encode_prompt

from .driving import Spy


def second_signal(conditioning: str, allowed: float, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What a block's second step is told of its first, where rows may lose `allowed` of theirs."""
    monkeypatch.setattr(self_conditioning, "DROPPED_MASS", allowed)
    model, tokenizer = load()
    cache = model.make_cache()
    model.prefill(
        mx.array(encode_prompt(tokenizer, "Write a sentence about the fox."))[None], cache
    )
    settings = DecodingSettings(conditioning=conditioning, max_denoising_steps=4)
    spy = Spy(model)
    steps = denoise.denoise_block(spy, cache, settings, [CanvasRequest(SeededDraws(1))])
    next(steps), next(steps)
    return spy.signals[1]


def test_rows_that_would_lose_too_much_are_summed_densely(monkeypatch):
    dense = second_signal("dense", 1.1, monkeypatch)
    kept = second_signal("sparse", -1.0, monkeypatch)
    thinned = second_signal("sparse", 1.1, monkeypatch)
    assert np.abs(kept - dense).max() < 1e-4
    assert 1e-3 < np.abs(thinned - dense).max() < 0.1 * np.abs(dense).max()
