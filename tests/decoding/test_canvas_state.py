"""Rows of a batch: one that joins later, or starts elsewhere, computes what it computes alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.decoding.block_result import finished
from mlx_dgemma.decoding.canvas import CanvasRequest, Pins, Start
from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.denoise import advance, denoise_block, step
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings

from .driving import drive

STEPS = 6


@pytest.fixture(scope="module")
def network():
    model = load()[0]
    cache = model.make_cache()
    model.prefill(np.arange(60, 90), cache)
    return model, cache


def state_of(model, request, block=0, first_row=0):
    length, vocabulary = model.config.canvas_length, model.config.text.vocab_size
    start = Place(block, 0, 0)
    return CanvasState.initial([request], start, length, vocabulary, STEPS, first_row=first_row)


@pytest.mark.parametrize("sampler", ["entropy-bound", "confidence-threshold"])
@pytest.mark.parametrize("conditioning", ["dense", "sparse"])
def test_a_row_that_joins_later_denoises_as_alone(network, sampler, conditioning):
    model, cache = network
    settings = DecodingSettings(
        max_denoising_steps=STEPS,
        sampler=sampler,
        conditioning=conditioning,
        stability_threshold=99,
        reveal_threshold=1.0,
    )
    requests = [
        CanvasRequest(SeededDraws(1)),
        CanvasRequest(SeededDraws(2), Pins.from_template([9, *[None] * 31])),
    ]
    alone = []
    for block, request in enumerate(requests):
        alone += drive(denoise_block(model, cache, settings, [request], block=block))[1]
    state = state_of(model, requests[0])
    results = {}
    for turn in range(STEPS + 1):
        if turn == 1:
            state.join(state_of(model, requests[1], block=1, first_row=1))
        outcome = step(model, cache, settings, state)
        numbers = outcome.report.read()
        ended = state.last | numbers.complete
        results |= finished(
            state, ended, numbers.complete, outcome.seen, outcome.settled, alternatives=None
        )
        advance(model, state, outcome, numbers)
        state.keep(~ended)
        if not state.rows:
            break
    assert sorted(results) == [0, 1]
    for row, expected in enumerate(alone):
        found = results[row]
        assert (found.steps, found.converged) == (expected.steps, expected.converged)
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.settled.tolist() == expected.settled.tolist()
        assert np.abs(found.entropy - expected.entropy).max() < 2e-3
    assert results[1].ids[0] == 9


def test_drafts_of_different_strengths_share_a_batch(network):
    model, cache = network
    settings = DecodingSettings(max_denoising_steps=STEPS, stability_threshold=99)
    ids = np.arange(100, 100 + model.config.canvas_length, dtype=np.int32)
    requests = [
        CanvasRequest(SeededDraws(row), None, Start(ids, strength))
        for row, strength in enumerate((0.0, 0.5, 1.0))
    ]
    alone = [drive(denoise_block(model, cache, settings, [one]))[1][0] for one in requests]
    steps, together = drive(denoise_block(model, cache, settings, requests))
    assert [result.steps for result in together] == [0, STEPS // 2, STEPS]
    assert [step.rows for step in steps] == [(1, 2)] * 3 + [(2,)] * 3
    for one, other in zip(alone, together, strict=True):
        assert one.ids.tolist() == other.ids.tolist()


def test_a_signal_of_zeros_is_none(network):
    """So that a row's first step can stand in a batch beside rows that have a signal."""
    model, cache = network
    canvas = mx.array(np.arange(5, 5 + model.config.canvas_length, dtype=np.int32))[None]
    silence = mx.zeros((*canvas.shape, model.config.text.hidden_size), model.dtype)
    assert mx.array_equal(model.hidden(canvas, cache, silence), model.hidden(canvas, cache))
