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
        return tasks.answers(model, tokenizer, folder, tasks.DEMO)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Where all ranks find a random network of two layers beside the demo's tokenizer, which two,
    three and four machines can share; in 4 bits, its packed matrices are cut between groups. And an
    adapter of PEFT's form, whose passes have deltas of their own."""
    shared = tmp_path_factory.mktemp("small")
    folder = shared / "model"
    folder.mkdir()
    for path in (*CHECKPOINT.glob("*token*"), *CHECKPOINT.glob("*_config.json")):
        shutil.copy(path, folder / path.name)
    shutil.copy(CHECKPOINT / "chat_template.jinja", folder)
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    raw["text_config"] |= {
        **{"num_attention_heads": 12, "num_key_value_heads": 12, "num_global_key_value_heads": 1},
        **{"intermediate_size": 224, "moe_intermediate_size": 128, "num_hidden_layers": 2},
        "layer_types": ["sliding_attention", "full_attention"],
    }
    raw["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(raw))
    mx.random.seed(3)
    tensors, config = {}, ModelConfig.from_dict(raw)
    for name, (shape, dtype) in parameter_shapes(config).items():
        if dtype == "uint32":
            numbers = mx.random.randint(0, 2**31 - 1, shape).astype(mx.uint32)
        elif name.endswith((".scales", ".biases")):
            numbers = mx.random.uniform(-0.02, 0.02, shape)
        else:
            numbers = mx.random.uniform(0.5, 1.0, shape)
        tensors[name] = numbers.astype(getattr(mx, dtype))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (shared / "peft").mkdir()
    deltas, queries = {}, 12 * config.text.head_dim_of(0)
    for tower in ("model.encoder.language_model", "model.decoder"):
        module = f"base_model.model.{tower}.layers.0.self_attn.q_proj"
        deltas[f"{module}.lora_A.weight"] = mx.random.normal((2, config.text.hidden_size))
        deltas[f"{module}.lora_B.weight"] = mx.random.normal((queries, 2))
    mx.save_safetensors(str(shared / "peft" / "adapter_model.safetensors"), deltas)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (shared / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    return shared


@pytest.fixture(scope="module")
def small_alone(small):
    with tasks.narrow_slices():
        return tasks.answers(*load(small / "model"), small, tasks.SMALL)


def together(size, folder, asked):
    out = folder / f"{size}.json"
    command = [sys.executable, str(PROGRAM), str(out), str(folder)]
    command += [task.__name__ for task in asked]
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
    check(together(2, folder, tasks.DEMO), alone, folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_feature_of_several_processes(size, small_alone, small):
    """Where the heads allow it: widths that do not divide evenly, more ranks than key heads."""
    check(together(size, small, tasks.SMALL), small_alone, small)
