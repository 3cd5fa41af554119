"""A model's own answers, tied to noise, and learning to arrive at them in fewer steps."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.training import run
from mlx_dgemma.training.batches import Batches, Noise
from mlx_dgemma.training.coupling import Coupling
from mlx_dgemma.training.run_events import Answered, Saved
from mlx_dgemma.training.settings import Settings

CANVAS = 32


def test_noise_decides_as_independent_draws_would():
    model = load_model(CHECKPOINT, lazy=True)
    coupling = Coupling(model)
    vocabulary = model.config.text.vocab_size
    noise = mx.arange(vocabulary)
    scores = np.array(coupling.scores(noise))
    # the Gumbel distribution has mean 0.577 and deviation 1.283
    assert scores.mean() == pytest.approx(0.577, abs=0.06)
    assert scores.std() == pytest.approx(1.283, abs=0.06)
    logits = mx.full((1, vocabulary), -30.0)
    options = mx.array([300, 400, 500, 600])
    logits[0, options] = mx.log(mx.array([0.4, 0.3, 0.2, 0.1]))
    chosen = (np.array(logits) + scores).argmax(axis=1)
    shares = [(chosen == option).mean() for option in options.tolist()]
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.07)
    token = mx.array([400])
    equivalent = np.array(coupling.equivalent(logits, token, noise))[0]
    assert (equivalent == (chosen == 400)).mean() > 0.99


def test_answers_are_kept_and_learned_from(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "adapter"
    data.mkdir()
    prompts = ("Reverse KXBZM", "Count from 8 to 14", "Sort the letters HCAQZ")
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in prompts]
    (data / "train.jsonl").write_text("\n".join(lines))
    settings = {
        "train": True, "objective": "few-steps", "data": str(data), "adapter_path": str(folder),
        "batch_size": 2, "iters": 2, "rank": 2, "num_layers": 1, "val_replies": 0,
        "answers_per_prompt": 2,
    }  # fmt: skip
    prepared = run.prepare(Settings(**settings))
    assert prepared.train(lambda _: None, cancelled=lambda: False)
    kinds = [type(event) for event in prepared.events]
    assert kinds.count(Answered) == 3
    assert kinds[-1] is Saved
    trails = prepared._trails["train"]
    assert len(trails) >= 4
    for trail in trails:
        assert len(trail.response) == CANVAS
        assert trail.canvases.shape[1] == CANVAS
        assert set(trail.response.tolist()) & set(prepared.tokenizer.stop_ids)
    batch = Batches(trails, 2, Noise(CANVAS, 896), 0, context_only=True).at(0)
    assert (batch.lengths == batch.starts).all()
    assert not (batch.noisy == batch.clean).all()
    first = mx.load(str(folder / "adapters.safetensors"))
    assert any(mx.abs(t).max().item() > 0 for n, t in first.items() if n.endswith("lora_b"))
    with pytest.raises(CheckpointError, match="another model, data or settings"):
        run.prepare(Settings(**{**settings, "seed": 1})).train(
            lambda _: None, cancelled=lambda: False
        )
