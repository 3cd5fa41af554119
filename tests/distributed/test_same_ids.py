"""Several processes that hold one model answer as one process that holds it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.demo import CHECKPOINT
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
def test_four_processes_answer_as_one_does(alone, folder):
    """More ranks than key heads."""
    check(together(4, folder, "logits", "text", "turns"), alone, folder)
