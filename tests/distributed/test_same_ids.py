"""Several processes that hold one model answer as one process that holds it all."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.parameters import parameter_shapes
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
from tests.distributed import tasks
from tests.distributed.processes import finish, start

PROGRAM = Path(tasks.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all ranks find an adapter of every kind of weight."""
    folder = tmp_path_factory.mktemp("shared")
    model = load_model(CHECKPOINT, lazy=True)
    keys = (*ATTENTION, *DENSE, EXPERTS, *SELF_CONDITIONING)
    tuning = Tuning(num_layers=2, rank=2, scale=3.0, keys=keys)
    attach(model, tuning)
    mx.random.seed(1)
    drawn = {name: mx.random.normal(part.shape) * 0.05 for name, part in trained(model).items()}
    (folder / "adapter").mkdir()
    mx.save_safetensors(str(folder / "adapter" / "adapters.safetensors"), drawn)
    write_config(folder / "adapter", tuning)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """What one process answers."""
    with tasks.narrow_slices():
        model, tokenizer = load()
        return tasks.answers(model, tokenizer, folder, tasks.TASKS)


def six_heads(folder):
    """A random network beside the demo's tokenizer that three machines can share; in 4 bits, its
    packed matrices are cut between groups."""
    folder.mkdir()
    for path in CHECKPOINT.glob("*token*"):
        shutil.copy(path, folder / path.name)
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    raw["vision_config"] = None
    raw["text_config"] |= {
        **{"num_attention_heads": 6, "num_key_value_heads": 3, "num_global_key_value_heads": 3},
        **{"intermediate_size": 224, "moe_intermediate_size": 96},
    }
    raw["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(raw))
    mx.random.seed(3)
    tensors = {}
    for name, (shape, dtype) in parameter_shapes(ModelConfig.from_dict(raw)).items():
        if dtype == "uint32":
            numbers = mx.random.randint(0, 2**31 - 1, shape).astype(mx.uint32)
        elif name.endswith((".scales", ".biases")):
            numbers = mx.random.uniform(-0.02, 0.02, shape)
        else:
            numbers = mx.random.uniform(0.5, 1.0, shape)
        tensors[name] = numbers.astype(getattr(mx, dtype))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def together(size, folder, *names):
    out = folder / f"{size}.json"
    command = [sys.executable, str(PROGRAM), str(out), str(folder), *names]
    spoken = finish(start(command, size, folder), timeout=240)
    assert out.exists(), spoken
    assert all(words == ("", "") for words in spoken[1:]), "only rank 0 speaks"
    return json.loads(out.read_text())


def check(found, alone, folder):
    for name, answer in found.items():
        assert answer == json.loads(json.dumps(alone[name])), name
    if "logits" in found:
        one, many = np.load(folder / "one.npy"), np.load(folder / "many.npy")
        assert np.abs(one - many).max() < 1e-5 * np.abs(one).max()


@pytest.mark.slow
def test_two_processes_answer_as_one_does(alone, folder):
    check(together(2, folder), alone, folder)


@pytest.mark.slow
def test_three_processes_answer_as_one_does(tmp_path):
    """Where the heads allow it; with widths that do not divide evenly, and packed weights."""
    folder = six_heads(tmp_path / "model").parent
    names = ("logits", "few_steps")
    with tasks.narrow_slices():
        alone = tasks.answers(*load(folder / "model"), folder, names)
    check(together(3, folder, *names), alone, folder)


@pytest.mark.slow
def test_four_processes_answer_as_one_does(alone, folder):
    """More ranks than key heads."""
    check(together(4, folder, "logits", "text", "turns"), alone, folder)
