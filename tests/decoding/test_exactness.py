"""The whole of the fast path at once: fifty seeded replies, the same ids as by the plain rules.

The plain side takes nothing from the fast one but the random numbers: a network whose matrices are
not joined, full float32 logits of `model.denoise`, and softmax, sampling, acceptance, stopping and
commits written out in NumPy float64.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import Commit, load, stream_generate
from mlx_dgemma.checkpoint.weights import cast, expand, load_model
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.demo.tasks import held_out
from mlx_dgemma.generate import encode_prompt
from mlx_dgemma.model import Model

TASKS = ("reverse", "sort", "list", "sentence", "json")
SEEDS = range(10)
STEPS = 8


@pytest.fixture(scope="module")
def fast():
    return load()


@pytest.fixture(scope="module")
def plain() -> Model:
    """The same weights in float32, nothing joined, no fused operation."""
    model = load_model(CHECKPOINT, lazy=True)
    expand(model)
    cast(model)
    assert all("gate_proj" in layer.mlp for layer in model.model.decoder.layers)
    return model


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def inverse_cdf(p: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """A vocabulary shorter than a slice needs the second uniform alone."""
    return np.array([(np.cumsum(row) <= u).sum() for row, u in zip(p, uniforms, strict=True)])


def accept(entropy: np.ndarray, bound: float) -> np.ndarray:
    order = np.argsort(entropy, kind="stable")
    ascending = entropy[order]
    accepted = np.zeros(entropy.shape, dtype=bool)
    accepted[order] = np.cumsum(ascending) - ascending <= bound
    return accepted


def plain_block(model, cache, settings, draws, block, attempt, length) -> np.ndarray:
    vocabulary = model.config.text.vocab_size
    canvas = np.array(draws.canvas(Place(block, attempt, 0), length, vocabulary))
    conditioning, drafts = None, []
    for taken in range(1, settings.max_denoising_steps + 1):
        place, left = Place(block, attempt, taken), settings.max_denoising_steps + 1 - taken
        spread = settings.t_max - settings.t_min
        now = settings.t_min + spread * left / settings.max_denoising_steps
        conditioning = model.denoise(mx.array(canvas)[None], cache, conditioning) / now
        p = softmax(np.array(conditioning[0], dtype=np.float64))
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
        drafts.append(p.argmax(axis=-1))
        stable = len(drafts) > 1 and np.array_equal(drafts[-1], drafts[-2])
        if stable and entropy.mean() < settings.confidence_threshold:
            break
        sample = inverse_cdf(p, np.array(draws.sample(place, length))[:, 1])
        fresh = np.array(draws.renoise(place, length, vocabulary))
        canvas = np.where(accept(entropy, settings.entropy_bound), sample, fresh)
    return drafts[-1]


def plain_reply(model, prompt, settings, seed) -> list[int]:
    """Blocks until a stop id or enough tokens; an empty first canvas is tried again, shorter."""
    cache, draws = model.make_cache(), SeededDraws(seed)
    model.prefill(prompt, cache)
    stops, length, ids = model.config.stop_ids, model.config.canvas_length, []
    for block in range(99):
        for attempt, divisor in enumerate((1, 2, 4) if block == 0 else (1,)):
            draft = plain_block(model, cache, settings, draws, block, attempt, length // divisor)
            if draft[0] not in stops:
                break
        end = next((at for at, token in enumerate(draft) if token in stops), None)
        ids += draft[:end].tolist()
        if end is not None or len(ids) >= settings.max_tokens:
            return ids[: settings.max_tokens]
        model.prefill(draft, cache)
    raise AssertionError("a reply without end")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_ten_replies_of_each_task_have_the_same_ids(task, fast, plain):
    model, tokenizer = fast
    settings = DecodingSettings.from_defaults(
        model.config.generation, {"max_tokens": 60, "max_denoising_steps": STEPS}
    )
    for seed, example in zip(SEEDS, held_out(task, len(SEEDS), seed=5), strict=True):
        events = stream_generate(
            model,
            tokenizer,
            example.messages,
            seed=seed,
            max_tokens=settings.max_tokens,
            max_denoising_steps=STEPS,
        )
        ids = [token for event in events if isinstance(event, Commit) for token in event.ids]
        prompt = encode_prompt(tokenizer, example.messages)
        assert ids == plain_reply(plain, prompt, settings, seed), (task, seed)


def test_logits_of_the_two_networks(fast, plain):
    """Joined matrices and fused operations move no logit by 1e-5 of the largest."""
    model, _ = fast
    caches = [network.make_cache() for network in (model, plain)]
    canvas = mx.array(np.random.default_rng(0).integers(0, 90, (1, model.config.canvas_length)))
    logits = []
    for network, cache in zip((model, plain), caches, strict=True):
        network.prefill(np.arange(50, 90), cache)
        first = network.denoise(canvas, cache)
        logits.append(np.array(network.denoise(canvas, cache, first / 0.7)))
    assert np.abs(logits[0] - logits[1]).max() < 1e-5 * np.abs(logits[1]).max()
