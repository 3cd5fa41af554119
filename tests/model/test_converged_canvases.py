"""The trained demo model on canvases it has converged on, where routing has settled.

On random canvases ties decide and parity says little; a converged canvas must come back as it is.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from transformers_oracle import Reference, assert_close

import mlx_dgemma.demo
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.demo.tasks import held_out
from mlx_dgemma.prompt.chat_template import encode_messages
from mlx_dgemma.prompt.tokenizer import load_tokenizer

DEMO = Path(mlx_dgemma.demo.__file__).parent / "checkpoint"


@pytest.fixture(scope="module")
def demo():
    return load_model(DEMO)


@pytest.fixture(scope="module")
def converged(demo):
    """(prompt ids, converged canvas, last tempered logits) of held-out prompts, greedily."""
    tokenizer = load_tokenizer(DEMO, demo.config.stop_ids)
    found = []
    for task in ("reverse", "sort", "count", "sudoku"):
        for example in held_out(task, 2, seed=5):
            ids = np.array([encode_messages(tokenizer, example.messages)])
            cache = demo.make_cache()
            demo.prefill(ids, cache)
            result = denoise(demo, cache)
            if result is not None:
                found.append((ids, *result))
    return found


def denoise(model, cache):
    """The reference's loop with the argmax as sample; None when it does not converge."""
    settings = model.config.generation
    rng = np.random.default_rng(0)
    vocabulary, length = model.config.text.vocab_size, model.config.canvas_length
    canvas = rng.integers(0, vocabulary, (1, length))
    previous, tempered = None, None
    for step in range(settings.max_denoising_steps, 0, -1):
        warmth = (settings.t_max - settings.t_min) * step / settings.max_denoising_steps
        tempered = model.denoise(mx.array(canvas), cache, tempered) / (settings.t_min + warmth)
        log = np.array(tempered - mx.logsumexp(tempered, axis=-1, keepdims=True))
        entropy = -(np.exp(log) * log).sum(-1)[0]
        draft = log.argmax(-1)
        stable = previous is not None and (draft == previous).all()
        if stable and entropy.mean() < settings.confidence_threshold:
            return draft, tempered
        order = np.argsort(entropy, kind="stable")
        before = np.cumsum(entropy[order]) - entropy[order]
        accepted = np.zeros(length, dtype=bool)
        accepted[order] = before <= settings.entropy_bound
        canvas = np.where(accepted, draft, rng.integers(0, vocabulary, (1, length)))
        previous = draft
    return None


def test_most_prompts_converge(converged):
    assert len(converged) >= 6


def test_a_converged_canvas_denoises_to_itself(demo, converged):
    same = []
    for ids, canvas, tempered in converged:
        cache = demo.make_cache()
        demo.prefill(ids, cache)
        again = np.array(demo.denoise(mx.array(canvas), cache, tempered)).argmax(-1)
        same.append((again == canvas).mean())
    assert np.mean(same) >= 63 / 64


def test_parity_on_converged_canvases(demo, converged):
    reference = Reference(DEMO)
    for ids, canvas, tempered in converged:
        reference.reset()
        reference.prefill(ids)
        cache = demo.make_cache()
        demo.prefill(ids, cache)
        for conditioning in (None, tempered):
            given = None if conditioning is None else np.array(conditioning)
            expected = reference.denoise(canvas, given)
            assert_close(demo.denoise(mx.array(canvas), cache, conditioning), expected)
        # The canvas as the next block's context: the encoder pass over converged tokens.
        reference.prefill(canvas)
        demo.prefill(canvas, cache)
        assert_close(demo.denoise(mx.array(canvas), cache), reference.denoise(canvas))
