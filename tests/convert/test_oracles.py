"""mlx-vlm and transformers read what is written, and we read what mlx-vlm writes."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.recipes import MIXES, RECIPES

PROMPT = [[5, 9, 20, 31, 7]]
CANVAS = [[40, 41, 3, 50, 60, 12, 80, 33]]


def our_logits(folder):
    model = load_model(folder, dtype=mx.float32)
    cache = model.make_cache()
    model.prefill(PROMPT, cache)
    return np.array(model.denoise(mx.array(CANVAS), cache))


def vlm_logits(folder):
    from mlx_vlm.utils import load_model as load_vlm

    model = load_vlm(Path(folder))
    return np.array(model(mx.array(PROMPT), canvas_ids=mx.array(CANVAS)).logits)


def assert_same(ours, theirs, tolerance=1e-4):
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < tolerance
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.parametrize("recipe", [*RECIPES, "mixed_3_6"])
def test_mlx_vlm_computes_the_same_logits(recipe, checkpoint, tmp_path):
    assert recipe in RECIPES or recipe in MIXES
    convert(checkpoint, tmp_path / "out", recipe=recipe, dtype="float32")
    assert_same(our_logits(tmp_path / "out"), vlm_logits(tmp_path / "out"))


@pytest.mark.parametrize("bits", [4, 8])
def test_we_read_what_mlx_vlm_writes(bits, checkpoint, tmp_path):
    from mlx_vlm.quant_utils import quantize_model
    from mlx_vlm.utils import load_model as load_vlm
    from mlx_vlm.utils import save_config, save_weights

    convert(checkpoint, tmp_path / "dense", dtype="float32")
    model = load_vlm(tmp_path / "dense")
    raw = json.loads((tmp_path / "dense/config.json").read_text())
    model, config = quantize_model(model, raw, 64, bits)
    save_weights(tmp_path / "theirs", model)
    save_config(config, config_path=tmp_path / "theirs" / "config.json")
    assert_same(our_logits(tmp_path / "theirs"), vlm_logits(tmp_path / "theirs"))


@pytest.fixture(scope="module")
def saved_dialect(tmp_path_factory):
    """A checkpoint that transformers saved, in its own dialect of config.json."""
    from random_checkpoint import Dims, write

    dims = Dims(hidden=64, dense=64, expert_width=64, canvas=8, dtype="float32")
    return write(tmp_path_factory.mktemp("saved"), dims, dialect="saved")


def test_the_saved_dialect_is_written_so_that_mlx_vlm_reads_it(saved_dialect, tmp_path):
    assert "per_layer_config" in (saved_dialect / "config.json").read_text()
    convert(saved_dialect, tmp_path / "out", quantize=True, dtype="float32")
    assert_same(our_logits(tmp_path / "out"), vlm_logits(tmp_path / "out"))


def test_transformers_reads_the_hugging_face_layout(saved_dialect, tmp_path):
    from transformers_oracle import Reference

    convert(saved_dialect, tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "hf", to_hf=True)
    logits = []
    for folder in (saved_dialect, tmp_path / "hf"):
        reference = Reference(folder)
        reference.prefill(np.array(PROMPT))
        logits.append(reference.denoise(np.array(CANVAS)))
    # The same numbers at other addresses: PyTorch's sums may differ in the last bit.
    assert_same(*logits, tolerance=1e-5)
    assert_same(our_logits(tmp_path / "hf"), logits[0])
