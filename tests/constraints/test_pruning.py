"""Candidates and a beam against the sums over every id and state (the demo's vocabulary)."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_dgemma import Constraint
from mlx_dgemma.constraints import Language
from mlx_dgemma.decoding.candidates import Distributions
from mlx_dgemma.decoding.conditioning import Conditioned, condition
from tests.constraints.dense import Sums, sums, text_probability
from tests.constraints.plain import plain
from tests.constraints.test_schemas import tokenizer

LENGTH = 20
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
        "pet": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CASES = {
    "schema": (Constraint.json_schema(SCHEMA), '{"name": "Ada", "age": 36, "pet": "cat"}'),
    "choice": (Constraint.choice(["yes, it is", "no, it is not", "perhaps"]), "no, it is not"),
    "regex": (Constraint.regex(r"[A-Z][a-z]+( [a-z]+){1,4}\."), "Two birds see the king."),
}


def distributions(text: str, noise: float, seed: int) -> np.ndarray:
    """float64 [C, V]: softmax of normal logits (deviation `noise`), the text's ids raised."""
    size = len(tokenizer())
    ids = [*tokenizer().encode(text), min(tokenizer().stop_ids)]
    raw = np.random.default_rng(seed).normal(0, noise, (LENGTH, size))
    for at in range(LENGTH):
        raw[at, ids[min(at, len(ids) - 1)]] += 12
    p = np.exp(raw - raw.max(1, keepdims=True))
    result: np.ndarray = p / p.sum(1, keepdims=True)
    return result


def candidates_of(p: np.ndarray, candidates: int) -> Distributions:
    order = np.argsort(p, axis=1)[:, -candidates:]
    return Distributions(
        order,
        np.take_along_axis(p, order, 1),
        lambda some: p[:, some],
        -(p * np.log(p)).sum(1),
        p.argmax(1),
        p.argmax(1),
        whole=candidates == p.shape[1],
    )


def conditioned(language: Language, p: np.ndarray, candidates: int, states: int) -> Conditioned:
    automaton = language.automaton
    return condition(
        automaton, candidates_of(p, candidates), start=automaton.start,
        uniforms=np.full(LENGTH, 0.4), ends_by=LENGTH, most_states=states,
    )  # fmt: skip


def marginals(result: Conditioned, p: np.ndarray) -> np.ndarray:
    found = result.plain[:, None] * p
    for at in range(LENGTH):
        np.add.at(found[at], result.ids[at], result.weights[at])
    return found


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Language, str]:
    constraint, text = CASES[request.param]
    return constraint.language(tokenizer(), len(tokenizer())), text


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_all_candidates_and_states_give_the_full_sums(
    case: tuple[Language, str], noise: float
) -> None:
    language, text = case
    p = distributions(text, noise, 1)
    full: Sums = sums(language.automaton, p)
    result = conditioned(language, p, p.shape[1], 10_000)
    np.testing.assert_allclose(marginals(result, p), full.marginals, atol=1e-6)
    best = text_probability(language.automaton, p, result.draft)
    assert best == pytest.approx(full.best, rel=1e-9)
    assert text_probability(language.automaton, p, result.sample) > 0


@pytest.mark.parametrize("noise", [1.0, 2.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_what_pruning_costs(case: tuple[Language, str], noise: float, seed: int) -> None:
    """With the 64 likeliest ids and 32 states the best text is the full sums' best, and no
    marginal is further from its own (total variation) than the mass that the ids leave out."""
    language, text = case
    p = distributions(text, noise, seed)
    full = sums(language.automaton, p)
    result = conditioned(language, p, 64, 32)
    best = text_probability(language.automaton, p, result.draft)
    assert best == pytest.approx(full.best, rel=1e-9)
    away = np.abs(marginals(result, p) - full.marginals).sum(1) / 2
    assert 0 < result.left_out < 0.25
    assert away.max() <= result.left_out


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_candidates_and_states_are_summed_as_if_one_by_one(
    case: tuple[Language, str], noise: float
) -> None:
    """Three canvases after each other, for what is kept from one to the next changes nothing."""
    language, text = case
    automaton = language.automaton
    for seed, states in ((1, 12), (2, 32), (3, 12)):
        p = distributions(text, noise, seed)
        result = conditioned(language, p, 12, states)
        expected = plain(automaton, candidates_of(p, 12), p, states)
        np.testing.assert_allclose(marginals(result, p), expected.marginals, atol=1e-6)
        best = text_probability(automaton, p, result.draft)
        assert np.log(best) == pytest.approx(expected.best, rel=1e-9)
        assert text_probability(automaton, p, result.sample) > 0
