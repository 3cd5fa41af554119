"""The vision tower through the converter: carried as it is, or packed where its widths allow."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.recipes import parse_rule
from mlx_dgemma.model import ImagePatches

TOWER = "model.encoder.vision_tower."


def soft_tokens(folder):
    """What a small random image becomes, in float32 [4, 128]."""
    places = np.array([(x, y) for y in range(4) for x in range(4)])
    pixels = np.random.default_rng(0).uniform(0, 1, (16, 48)).astype(np.float32)
    features = load_model(folder, dtype=mx.float32).image_features(ImagePatches(pixels, places))
    return np.array(features.astype(mx.float32))


@pytest.fixture(scope="module")
def expected(checkpoint):
    return soft_tokens(checkpoint)


def test_the_tower_is_carried_in_bfloat16(checkpoint, tensors, expected, tmp_path, read_tensors):
    convert(checkpoint, tmp_path / "out", quantize=True)
    found = read_tensors(tmp_path / "out")
    carried = [name for name in tensors if name.startswith(TOWER)]
    assert len(carried) > 10
    for name in carried:
        assert found[name].dtype == mx.bfloat16
        assert np.array_equal(np.array(found[name].astype(mx.float32)), tensors[name])
    ours = soft_tokens(tmp_path / "out")  # the projection after the tower is packed
    assert np.abs(ours - expected).max() < 0.2 * np.abs(expected).max()


def test_the_tower_is_packed_where_asked_and_possible(
    checkpoint, tensors, expected, tmp_path, read_tensors
):
    """Rows of 64 are packed; rows of 48 pixels and 72 neurons stay as they are."""
    rules = [parse_rule(f"{TOWER}*=8")]
    convert(checkpoint, tmp_path / "out", recipe="8bit", rules=rules)
    found = read_tensors(tmp_path / "out")
    packed = {name.removesuffix(".scales") for name in found if name.endswith(".scales")}
    matrices = {
        name.removesuffix(".weight")
        for name, values in tensors.items()
        if name.startswith(TOWER) and name.endswith("_proj.linear.weight") and values.shape[1] == 64
    }
    assert matrices
    assert matrices == {name for name in packed if name.startswith(TOWER)}
    ours = soft_tokens(tmp_path / "out")
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.05
