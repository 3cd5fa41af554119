"""Weights that cannot be read any more once their header was: one sentence, no traceback.

In processes of their own: MLX reports a failed read again to whatever its stream computes next.
"""

import shutil
import subprocess
import sys

import pytest

from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.files import reading_weights

CUT_WHILE_LOADING = """
import os, sys
from pathlib import Path
from mlx_dgemma.checkpoint import weights
from mlx_dgemma.errors import CheckpointError

folder, fill = Path(sys.argv[1]), weights.fill

def cut_then_fill(model, parameters):
    os.truncate(folder / "model.safetensors", 100_000)
    fill(model, parameters)

weights.fill = cut_then_fill
try:
    weights.load_model(folder)
except CheckpointError as error:
    print(error)
"""
CUT_BEFORE_AN_IMAGE = """
import os, sys
from pathlib import Path
import numpy as np
from mlx_dgemma.checkpoint import weights
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.vision import ImagePatches

folder = Path(sys.argv[1])
model = weights.load_model(folder)
os.truncate(folder / "model.safetensors", 100_000)
patch = model.config.vision.patch_size
places = np.array([[x, y] for y in range(6) for x in range(6)])
image = ImagePatches(np.zeros((36, 3 * patch**2), np.float32), places)
try:
    model.image_features(image)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (CUT_WHILE_LOADING, "can no longer be read; were the files cut short"),
        (CUT_BEFORE_AN_IMAGE, "The vision tower: the weights can no longer be"),
    ],
    ids=["while it is loaded", "before the first image"],
)
def test_a_file_that_is_cut_short(tmp_path, program, sentence):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "demo")
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True
    )
    assert sentence in done.stdout, done.stderr


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="something else"), reading_weights("x"):
        raise RuntimeError("something else")
