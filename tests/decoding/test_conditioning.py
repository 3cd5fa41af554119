"""Which way a step's self-conditioning is summed, position by position, and for which at all."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.decoding import denoise, prediction, report, self_conditioning
from mlx_dgemma.decoding.canvas import CanvasRequest, Pins
from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.generate import encode_prompt

from .driving import Spy, drive


def second_signal(conditioning: str, allowed: float, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What a block's second step is told of its first, where rows may lose `allowed` of theirs."""
    monkeypatch.setattr(self_conditioning, "DROPPED_MASS", allowed)
    model, tokenizer = load()
    cache = model.make_cache()
    model.prefill(
        mx.array(encode_prompt(tokenizer, "Write a sentence about the fox."))[None], cache
    )
    settings = DecodingSettings(conditioning=conditioning, max_denoising_steps=4)
    spy = Spy(model)
    steps = denoise.denoise_block(spy, cache, settings, [CanvasRequest(SeededDraws(1))])
    next(steps), next(steps)
    return spy.signals[1]


def test_rows_that_would_lose_too_much_are_summed_densely(monkeypatch):
    dense = second_signal("dense", 1.1, monkeypatch)
    kept = second_signal("sparse", -1.0, monkeypatch)
    thinned = second_signal("sparse", 1.1, monkeypatch)
    assert np.abs(kept - dense).max() < 1e-4
    assert 1e-3 < np.abs(thinned - dense).max() < 0.1 * np.abs(dense).max()


def test_every_position_is_summed_for_itself(monkeypatch):
    """Where half of the positions lose little enough, those are summed sparsely and no others."""
    dropped = []
    read = report.Report.read

    def watched(self):
        numbers = read(self)
        dropped.append(numbers.dropped)
        return numbers

    monkeypatch.setattr(report.Report, "read", watched)
    dense = second_signal("sparse", -1.0, monkeypatch)[0]
    thinned = second_signal("sparse", 1.1, monkeypatch)[0]
    some = float(np.median(dropped[0]))
    mixed = second_signal("sparse", some, monkeypatch)[0]
    sparse = dropped[0] < some
    assert 0 < sparse.sum() < sparse.size
    np.testing.assert_array_equal(mixed[sparse], thinned[sparse])
    np.testing.assert_allclose(mixed[~sparse], dense[~sparse], atol=1e-4)
    told = np.abs(thinned - dense).max(axis=1)
    assert told[~sparse].max() > 1e-3  # it matters which


def test_nothing_is_selected_where_no_position_can_qualify(monkeypatch):
    """The step before says so: its surest position was all but uniform."""
    model, tokenizer = load()
    vocabulary, cache = model.config.text.vocab_size, model.make_cache()
    model.prefill(mx.array(encode_prompt(tokenizer, "Write a sentence."))[None], cache)
    settings, length = DecodingSettings(conditioning="sparse"), model.config.canvas_length
    request = CanvasRequest(SeededDraws(1), Pins.from_template([7, *[None] * (length - 1)]))
    state = CanvasState.initial([request], Place(0, 0, 0), length, vocabulary, 4)
    outcome = denoise.step(model, cache, settings, state)
    assert outcome.survivors is not None
    assert outcome.survivors.counts.shape == (length - 1,)  # the pinned position asks nothing
    numbers = outcome.report.read()
    denoise.advance(model, state, outcome, numbers)
    assert state.least_entropy == pytest.approx(numbers.entropy[1:].min())
    highest = self_conditioning.most_entropy(vocabulary)
    for entropy, selected in ((highest - 1e-3, True), (highest + 1e-3, False)):
        state.least_entropy = entropy
        assert (denoise.step(model, cache, settings, state).survivors is not None) is selected


def test_pinned_positions_cost_no_head_and_no_signal(monkeypatch):
    """Free positions draw what they draw where the whole canvas is predicted."""
    model, tokenizer = load()
    cache, rows = model.make_cache(), []
    model.prefill(mx.array(encode_prompt(tokenizer, "Write a sentence."))[None], cache)
    length = model.config.canvas_length
    template = [7 if position % 3 else None for position in range(length)]
    settings = DecodingSettings(max_denoising_steps=3, stability_threshold=9)
    made = prediction.make_logits

    def watched(model, hidden, *rest):
        rows.append(hidden.shape[0])
        return made(model, hidden, *rest)

    monkeypatch.setattr(prediction, "make_logits", watched)
    request = CanvasRequest(SeededDraws(1), Pins.from_template(template))
    run = partial(denoise.denoise_block, model, cache, settings, [request], alternatives=0)
    _, (found,) = drive(run())
    free = sum(token is None for token in template)
    assert rows == [free] * 3
    monkeypatch.setattr(prediction, "free_positions", lambda state: np.arange(length))
    _, (whole,) = drive(run())
    np.testing.assert_array_equal(found.ids, whole.ids)
    np.testing.assert_array_equal(found.settled, whole.settled)
    np.testing.assert_allclose(found.entropy, whole.entropy, atol=1e-4)
    np.testing.assert_allclose(found.scores.logprobs, whole.scores.logprobs, atol=1e-3)
    assert not found.entropy[[token is not None for token in template]].any()


def test_a_canvas_of_pins_alone_stays_as_it_is():
    model, _ = load()
    length = model.config.canvas_length
    request = CanvasRequest(SeededDraws(1), Pins.from_template([9] * length))
    settings = DecodingSettings(max_denoising_steps=3)
    _, (found,) = drive(denoise.denoise_block(model, model.make_cache(), settings, [request]))
    assert found.ids.tolist() == [9] * length
    assert found.converged
    assert not found.entropy.any()
