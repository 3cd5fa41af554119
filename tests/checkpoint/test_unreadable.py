"""Weights that cannot be read any more once their header was: one sentence, no traceback."""

import os
import shutil

import numpy as np
import pytest

from mlx_dgemma.checkpoint import weights
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import reading_weights
from mlx_dgemma.model.vision import ImagePatches


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(CHECKPOINT, tmp_path / "demo")


def test_a_file_that_is_cut_short_while_it_is_loaded(copy, monkeypatch):
    fill = weights.fill

    def cut_then_fill(model, parameters):
        os.truncate(copy / "model.safetensors", 100_000)
        fill(model, parameters)

    monkeypatch.setattr(weights, "fill", cut_then_fill)
    with pytest.raises(CheckpointError, match=r"can no longer be read; were the files cut short"):
        weights.load_model(copy)


def test_a_vision_tower_that_is_gone_when_the_first_image_comes(copy):
    model = weights.load_model(copy)
    os.truncate(copy / "model.safetensors", 100_000)
    patch = model.config.vision.patch_size
    places = np.array([[x, y] for y in range(6) for x in range(6)])
    image = ImagePatches(np.zeros((36, 3 * patch**2), np.float32), places)
    with pytest.raises(CheckpointError, match="The vision tower: the weights can no longer be"):
        model.image_features(image)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="something else"), reading_weights("x"):
        raise RuntimeError("something else")
