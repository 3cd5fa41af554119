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


def logits(folder, dtype, **options):
    model = load_model(folder, dtype=dtype, **options)
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


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "dense"])
def test_a_unit_changes_no_bit_in_float32(tmp_path, mode):
    document = dict(QUANTIZED)
    if mode == "dense":
        del document["quantization"]
    if mode == "mxfp4":
        document["quantization"] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    folder = write_plain(tmp_path / "checkpoint", document)
    plain = logits(folder, mx.float32)
    assert (logits(folder, mx.float32, unit=32) == plain).all()


def test_a_unit_holds_branches_beyond_the_range_of_float16(tmp_path):
    """up passes 65,504 here; the norm after it would give NaN."""

    def enlarge(tensors):
        for name in tensors:
            if ".mlp.up_proj." in name and name.endswith(("scales", "biases")):
                tensors[name] = tensors[name] * 1e5

    folder = write_plain(tmp_path / "checkpoint", QUANTIZED, change=enlarge)
    exact = logits(folder, mx.float32)
    assert not np.isfinite(logits(folder, mx.float16)).all()
    half = logits(folder, mx.float16, unit=16)
    assert np.isfinite(half).all()
    assert np.abs(half - exact).mean() < 0.1 * np.abs(exact).mean()


def test_units_are_powers_of_two(tmp_path):
    folder = write_plain(tmp_path / "checkpoint", QUANTIZED)
    with pytest.raises(ValueError, match="unit=3 is no power of two"):
        load_model(folder, unit=3)
