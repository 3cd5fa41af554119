"""Scores of texts in Python, and several replies to one prompt: each against the obvious way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_dgemma import Finish, load, stream_generate
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.errors import CancelledError, InputError
from mlx_dgemma.evaluation.several_replies import replies
from mlx_dgemma.generate import encode_prompt
from mlx_dgemma.model import network
from mlx_dgemma.scoring import continuation_scores, prompt_score_turns, prompt_scores

QUICK: Any = {"max_denoising_steps": 1, "canvas_length": 16, "max_tokens": 40}


@pytest.fixture(scope="module")
def demo() -> Any:
    return load()


@pytest.fixture(scope="module")
def ids(demo: Any) -> list[int]:
    _, tokenizer = demo
    return [tokenizer.ids["bos"], *tokenizer.encode("Reverse the letters CANVAS, please.")]


def test_a_prompt_in_chunks_has_the_scores_of_the_whole(
    demo: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = demo
    whole = prompt_scores(model, ids, top_logprobs=3)
    monkeypatch.setattr("mlx_dgemma.scoring.CHUNK", 5)
    parts = prompt_scores(model, ids, top_logprobs=3)
    assert len(ids) < network.CHUNK
    assert np.isnan(whole.logprobs[0])
    assert np.isnan(whole.top_logprobs[0]).all()
    np.testing.assert_allclose(parts.logprobs[1:], whole.logprobs[1:], atol=1e-4)
    np.testing.assert_allclose(parts.top_logprobs[1:], whole.top_logprobs[1:], atol=1e-4)
    assert (np.diff(whole.top_logprobs[1:], axis=1) <= 0).all()


def test_continuations_after_one_context_have_the_scores_of_the_whole_texts(
    demo: Any, ids: list[int]
) -> None:
    model, tokenizer = demo
    texts = [tokenizer.encode(text) for text in ("SAVNAC", "CANVAS is it", "x")]
    found = continuation_scores(model, ids, texts, top_logprobs=1)
    for text, scored in zip(texts, found, strict=True):
        whole = prompt_scores(model, [*ids, *text], top_logprobs=1)
        np.testing.assert_allclose(scored.logprobs, whole.logprobs[len(ids) :], atol=1e-4)
        np.testing.assert_array_equal(scored.top_ids, whole.top_ids[len(ids) :])


def test_what_cannot_be_scored_is_refused(demo: Any, ids: list[int]) -> None:
    model, _ = demo
    with pytest.raises(InputError, match="nothing to score"):
        prompt_scores(model, [])
    with pytest.raises(InputError, match="top_logprobs=21 is not possible"):
        prompt_scores(model, ids, top_logprobs=21)
    with pytest.raises(InputError, match="the context holds"):
        prompt_scores(model, [3] * 100_000_000)
    with pytest.raises(CancelledError):
        list(prompt_score_turns(model, ids, cancelled=lambda: True))
    assert prompt_scores(model, ids[:1]).logprobs.shape == (1,)


@pytest.mark.parametrize("more", [{}, {"empty_reply": "suppress"}], ids=["reroll", "suppress"])
def test_replies_side_by_side_are_those_of_each_alone(demo: Any, more: dict[str, Any]) -> None:
    model, tokenizer = demo
    prompt, seeds = "Tell me a story of the sea", [3, 4, 5]
    options = {**QUICK, **more}
    settings = DecodingSettings.from_defaults(model.config.generation, options)
    ids = encode_prompt(tokenizer, prompt)
    together = replies(model, tokenizer, ids, seeds, settings, stop=["e"], batch=2)
    for seed, answer in zip(seeds, together, strict=True):
        events = list(stream_generate(model, tokenizer, ids, seed=seed, stop=["e"], **options))
        alone = events[-1]
        assert isinstance(alone, Finish)
        assert answer.text == "".join(event.text for event in events)
        for name in ("reason", "seed", "steps_per_block", "converged", "prompt_tokens",
                     "generated_tokens", "tokens_per_forward", "stop_string"):  # fmt: skip
            assert getattr(answer.finish, name) == getattr(alone, name), name
    assert len({answer.text for answer in together}) > 1
