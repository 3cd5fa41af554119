"""The whole of generation against transformers' own, on the trained demo checkpoint.

Both sample, from different generators, so they agree as distributions do: the share of right
answers and the tokens per forward over the same held-out prompts, within sampling error.

What this cannot see: an entropy bound of 0.15 or 0.2 instead of 0.1, which moves the steps of 140
open-ended prompts by 1 and 1.7 standard errors. The sampler's rules are tested exactly elsewhere
(truth tables, and fifty replies against the rules written out); here the whole is.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.decoding.blocks import Request, generate_blocks
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.events import Commit, Finish
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.demo.tasks import held_out
from mlx_dgemma.generate import encode_prompt

torch = pytest.importorskip("torch", reason="the oracle needs PyTorch (extra: dev)")
transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")

# Single-answer and open-ended tasks whose reply fits one canvas.
TASKS = {"reverse": 35, "sudoku": 35, "grid": 35, "list": 35, "sentence": 35, "json": 35}
# |z| of a paired test. Both sides' draws are fixed, so a run that passes passes again.
LIMIT = 3.0


@pytest.fixture(scope="module")
def examples():
    return [example for task, n in TASKS.items() for example in held_out(task, n, seed=77)]


@pytest.fixture(scope="module")
def ours(examples):
    """(right, tokens per forward, steps) per example."""
    model, tokenizer = load()
    results = []
    for seed, example in enumerate(examples):
        request = Request(
            prompt=encode_prompt(tokenizer, example.messages),
            settings=DecodingSettings.from_defaults(
                model.config.generation, {"max_tokens": model.config.canvas_length}
            ),
            draws=SeededDraws(seed),
            seed=seed,
            stop_ids=tokenizer.stop_ids,
        )
        events = list(generate_blocks(model, model.make_cache(), request))
        ids = [token for event in events if isinstance(event, Commit) for token in event.ids]
        finish = events[-1]
        assert isinstance(finish, Finish)
        steps = finish.steps_per_block[0]
        results.append((example.verify(tokenizer.decode(ids)), (len(ids) + 1) / steps, steps))
    return np.array(results, dtype=float)


@pytest.fixture(scope="module")
def reference(examples):
    """The same from transformers' `generate`, prompts of one length side by side."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
        CHECKPOINT, dtype=torch.float32
    ).eval()
    _, tokenizer = load()
    by_length = defaultdict(list)
    for index, example in enumerate(examples):
        ids = encode_prompt(tokenizer, example.messages)
        by_length[len(ids)].append((index, ids))
    results = np.zeros((len(examples), 3))
    canvas = model.config.canvas_length
    for group in by_length.values():
        prompts = torch.tensor([ids for _, ids in group])
        out = model.generate(prompts, max_new_tokens=canvas)
        for (index, ids), row, rate in zip(
            group, out.sequences.tolist(), out.tokens_per_forward.tolist(), strict=True
        ):
            reply = row[len(ids) :]
            end = next(
                (at for at, token in enumerate(reply) if token in tokenizer.stop_ids), canvas
            )
            text = tokenizer.decode(reply[:end])
            steps = min(end + 1, canvas) / rate
            results[index] = examples[index].verify(text), rate, steps
    return results


def z(ours: np.ndarray, reference: np.ndarray) -> float:
    """Paired by prompt: the mean difference in its own standard errors."""
    difference = ours - reference
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return float(difference.mean() / error) if error > 0 else 0.0


@pytest.mark.slow
def test_accuracy_agrees_within_sampling_error(ours, reference):
    assert len(ours) >= 200
    assert abs(z(ours[:, 0], reference[:, 0])) < LIMIT


@pytest.mark.slow
def test_tokens_per_forward_agree_within_sampling_error(ours, reference):
    assert abs(z(ours[:, 1], reference[:, 1])) < LIMIT


@pytest.mark.slow
def test_steps_per_block_agree_within_sampling_error(ours, reference):
    assert abs(z(ours[:, 2], reference[:, 2])) < LIMIT


@pytest.mark.slow
def test_a_looser_sampler_would_be_noticed(ours, examples):
    """The test can fail: an entropy bound ten times the reference's takes fewer steps."""
    model, tokenizer = load()
    steps = []
    for seed, example in enumerate(examples):
        if example.task != "grid":
            continue
        settings = DecodingSettings.from_defaults(
            model.config.generation,
            {"max_tokens": model.config.canvas_length, "entropy_bound": 1.0},
        )
        request = Request(
            prompt=encode_prompt(tokenizer, example.messages),
            settings=settings,
            draws=SeededDraws(seed),
            seed=seed,
            stop_ids=tokenizer.stop_ids,
        )
        events = list(generate_blocks(model, model.make_cache(), request))
        finish = events[-1]
        assert isinstance(finish, Finish)
        steps.append(finish.steps_per_block[0])
    chosen = [i for i, example in enumerate(examples) if example.task == "grid"]
    assert z(np.array(steps, dtype=float), ours[chosen, 2]) < -LIMIT
