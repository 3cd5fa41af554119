"""Adapter folders that are damaged, of another model or of another kind: one sentence each."""

import contextlib
import json
import time

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.adapters import read_adapter
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import CheckpointError, ModelNotFoundError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.training.tuning import (
    ATTENTION,
    DENSE,
    EXPERTS,
    SELF_CONDITIONING,
    Tuning,
    attach,
    trained,
    write_config,
)

CONFIG = ModelConfig.from_folder(CHECKPOINT)
MODULE = "model.decoder.layers.0.self_attn.q_proj"
WIDTH = CONFIG.text.hidden_size
QUERIES = CONFIG.text.num_attention_heads * CONFIG.text.head_dim_of(0)


def peft(folder, settings=None, **changes):
    tensors = {
        f"base_model.model.{MODULE}.lora_A.weight": mx.ones((4, WIDTH)),
        f"base_model.model.{MODULE}.lora_B.weight": mx.ones((QUERIES, 4)),
    }
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), {**tensors, **changes})
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **(settings or {})}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def of_mlx(folder, settings=None, **shapes):
    shapes = {"lora_a": (WIDTH, 4), "lora_b": (4, QUERIES), **shapes}
    tensors = {f"{MODULE}.{name}": mx.ones(shape) for name, shape in shapes.items() if shape}
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    values = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}, **(settings or {})}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def test_both_forms_are_read(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "mlx").mkdir()
    one = read_adapter(peft(tmp_path / "peft"), CONFIG)
    assert list(one.decoder) == [f"{MODULE}.weight"]
    assert one.encoder == {}
    assert one.decoder[f"{MODULE}.weight"].scale == 2.0
    other = read_adapter(of_mlx(tmp_path / "mlx"), CONFIG)
    assert list(other.decoder) == list(other.encoder) == [f"{MODULE}.weight"]
    other.check_mergeable()
    assert other.nbytes == one.nbytes == 4 * 4 * (WIDTH + QUERIES)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": 1e308}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"use_dora": True}, "has no magnitudes"),
        ({"bias": "all"}, "bias"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj is missing"),
        ({"alpha_pattern": {"(": 1}}, "no pattern"),
        ({"alpha_pattern": {"a" * 1000: 1}}, "no pattern"),
        ({"alpha_pattern": {f"q{i}": 1 for i in range(5000)}}, "more than 4,096"),
    ],
)
def test_settings_that_cannot_be_honoured(settings, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        read_adapter(peft(tmp_path, settings), CONFIG)


@pytest.mark.parametrize("pattern", [r"(.*)*(.*)*(.*)*(.*)*x", r"((\w|\.)+)+!", r"(a|a|_|.)*\d{9}"])
def test_a_catastrophic_pattern_is_bounded_in_time(pattern, tmp_path):
    folder = peft(tmp_path, {"alpha_pattern": {pattern: 1}})
    began = time.process_time()
    with contextlib.suppress(CheckpointError):
        read_adapter(folder, CONFIG)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"lora_a": None}, "lora_b only"),
        ({"lora_a": (WIDTH, 3)}, "do not fit"),
        ({"lora_a": (WIDTH,)}, "do not fit"),
        ({"lora_a": (WIDTH, 0), "lora_b": (0, QUERIES)}, "do not fit"),
        ({"lora_a": (WIDTH + 1, 4)}, "another model"),
        ({"m": (QUERIES,)}, "has magnitudes"),
        ({"lora_a": None, "lora_b": None, "m": (QUERIES,)}, "has magnitudes"),
        ({"mm": (QUERIES,)}, "no low-rank delta"),
    ],
)
def test_matrices_that_do_not_fit(shapes, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        read_adapter(of_mlx(tmp_path, **shapes), CONFIG)


def test_what_else_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"adapter_config\.json"):
        read_adapter(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="fine_tune_type"):
        read_adapter(of_mlx(tmp_path, {"fine_tune_type": "prefix"}), CONFIG)
    dora = {"fine_tune_type": "dora"}
    with pytest.raises(CheckpointError, match="has no magnitudes"):
        read_adapter(of_mlx(tmp_path, dora), CONFIG)
    with pytest.raises(CheckpointError, match="do not fit its delta"):
        read_adapter(of_mlx(tmp_path, dora, m=(QUERIES + 1,)), CONFIG)
    with pytest.raises(CheckpointError, match="scale"):
        read_adapter(of_mlx(tmp_path, {"lora_parameters": {"scale": "2"}}), CONFIG)
    of_mlx(tmp_path)
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="copy the adapter again"):
        read_adapter(tmp_path, CONFIG)
    nan = mx.full((4, WIDTH), float("nan"))
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        read_adapter(peft(tmp_path, **{f"base_model.model.{MODULE}.lora_A.weight": nan}), CONFIG)


@pytest.mark.parametrize("rank", [2, 5])
def test_what_our_training_writes_is_applied_as_it_was_trained(rank, tmp_path):
    """Attention, dense branch, experts and self-conditioning, in the last two layers and in all."""
    model = load_model(CHECKPOINT, lazy=True)
    keys = (*ATTENTION, *DENSE, EXPERTS, *SELF_CONDITIONING)
    tuning = Tuning(num_layers=-1 if rank == 2 else 2, rank=rank, scale=3.0, keys=keys)
    attach(model, tuning)
    mx.random.seed(rank)
    drawn = {name: mx.random.normal(part.shape) * 0.05 for name, part in trained(model).items()}
    model.load_weights(list(drawn.items()), strict=False)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), drawn)
    write_config(tmp_path, tuning)
    expected = logits(model)
    found = logits(load_model(CHECKPOINT, adapter_path=tmp_path))
    plain = logits(load_model(CHECKPOINT))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 0.05 * np.abs(expected).max()


def logits(model):
    """Of a step with a signal, after a short prompt."""
    cache = model.make_cache()
    model.prefill(list(range(5, 25)), cache)
    canvas = mx.arange(CONFIG.canvas_length)[None] % CONFIG.text.vocab_size
    shape = (1, CONFIG.canvas_length, CONFIG.text.vocab_size)
    signal = mx.random.normal(shape, key=mx.random.key(1))
    return np.array(model.denoise(canvas, cache, signal))
