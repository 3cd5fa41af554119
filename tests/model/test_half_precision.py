"""float16 operands, as M1 and M2 compute fastest: the residual stream stays wide."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from configs import config
from plain_checkpoint import write_plain

from mlx_dgemma.checkpoint.weights import load_model

# MLX's CPU backend multiplies experts in float16 only when they are quantized.
QUANTIZED = {
    **config(hidden_size=64, intermediate_size=64, moe_intermediate_size=64, head_dim=32),
    "quantization": {"group_size": 32, "bits": 8, "mode": "affine"},
}


def logits(folder, dtype):
    model = load_model(folder, dtype=dtype)
    cache = model.make_cache()
    model.prefill(np.arange(20)[None], cache)
    canvas = mx.array(np.random.default_rng(1).integers(0, 90, (1, 12)))
    first = model.denoise(canvas, cache)
    assert model.dtype == dtype
    return np.array(model.denoise(canvas, cache, first / 0.8))


@pytest.mark.parametrize("residual", [1.0, 3e4])
def test_float16_survives_a_residual_beyond_its_range(tmp_path, residual):
    def enlarge(tensors):
        for name in tensors:
            if name.endswith(".post_feedforward_layernorm.weight"):
                tensors[name] = tensors[name] * residual

    folder = write_plain(tmp_path / "checkpoint", QUANTIZED, change=enlarge)
    exact, half = logits(folder, mx.float32), logits(folder, mx.float16)
    assert np.isfinite(half).all()
    # the mean: random routers are close to ties, and one other expert moves a whole position
    assert np.abs(half - exact).mean() < 0.1 * np.abs(exact).mean()
