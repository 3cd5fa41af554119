"""A model's own answers, and learning to arrive at them in fewer steps."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.training import run
from mlx_dgemma.training.batches import Batches, Noise
from mlx_dgemma.training.data import Trail
from mlx_dgemma.training.run_events import Answered, Report, Saved
from mlx_dgemma.training.sampled_answers import Answers
from mlx_dgemma.training.settings import Settings

CANVAS = 32


def test_the_references_answers_are_learned_from_noise_and_others_from_their_canvases():
    start, drawn = np.full(CANVAS, 3, np.int32), np.full(CANVAS, 4, np.int32)
    prompt, answer = np.array([1, 2], np.int32), np.full(CANVAS, 5, np.int32)
    own = Trail(prompt, answer, canvases=np.stack([start, drawn]))
    reference = Trail(prompt, answer, canvases=start[None])
    for trail, fresh, on_the_way in ((own, 0, 1), (reference, 0.5, 0)):
        batch = Batches([trail] * 200, 200, Noise(CANVAS, 896), 0, context_only=True).at(0)
        assert (batch.starts == 2).all()
        assert (batch.clean == 5).all()
        begins, drawn = ((batch.noisy == value).all(axis=1) for value in (3, 4))
        assert begins.mean() == pytest.approx(fresh, abs=0.1)
        assert drawn.mean() == on_the_way
        assert not batch.conditioned[begins].any()
        assert (batch.sure == drawn).all()
        assert (batch.noisier[drawn] == 3).all()
        assert batch.conditioned[drawn].all()


def test_answers_are_kept_and_learned_from(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "adapter"
    data.mkdir()
    prompts = ("Reverse KXBZM", "Count from 8 to 14", "Sort the letters HCAQZ")
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in prompts]
    (data / "train.jsonl").write_text("\n".join(lines))
    settings = {
        "train": True, "objective": "few-steps", "data": str(data), "adapter_path": str(folder),
        "batch_size": 2, "iters": 2, "rank": 2, "num_layers": 1, "val_replies": 0,
        "answers_per_prompt": 2, "rounds": 2,
    }  # fmt: skip
    asked = []

    def judge(prompt, ids):
        asked.append((prompt, ids))
        return True

    prepared = run.prepare(Settings(**settings))
    assert prepared.train(lambda _: None, cancelled=lambda: False, judge=judge)
    kinds = [type(event) for event in prepared.events]
    assert kinds == [Answered] * 6 + [Saved] + [Answered] * 3 + [Report, Saved]
    assert [event.step for event in prepared.events[:8]] == [0] * 6 + [1, 1]
    found = {}
    for number in ("reference", 0, 1):
        file = folder / f"answers-train-{number}.safetensors"
        header = mx.load(str(file), return_metadata=True)[1]
        found[number] = Answers(file, header["identity"], CANVAS)
    trails = found[0].trails(prepared.splits["train"])
    assert len(trails) >= 4
    assert len(asked) == sum(
        len(answers.trails(prepared.splits["train"])) for answers in found.values()
    )
    for trail in trails:
        assert len(trail.response) == CANVAS
        assert 2 <= len(trail.canvases) <= 4
        assert set(trail.response.tolist()) & set(prepared.tokenizer.stop_ids)
    first = mx.load(str(folder / "adapters.safetensors"))
    assert any(mx.abs(t).max().item() > 0 for n, t in first.items() if n.endswith("lora_b"))
    assert json.loads((folder / "adapter_config.json").read_text())["entropy_bound"] == 3.0
    with pytest.raises(CheckpointError, match="another model, data or settings"):
        run.prepare(Settings(**{**settings, "seed": 1})).train(
            lambda _: None, cancelled=lambda: False
        )
