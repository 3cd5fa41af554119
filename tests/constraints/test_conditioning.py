"""The sums, the best text and the draws against every sequence of a tiny vocabulary."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.expressions import Space
from mlx_dgemma.constraints.regex import full_match
from mlx_dgemma.constraints.transitions import END
from mlx_dgemma.decoding.candidates import Distributions
from mlx_dgemma.decoding.conditioning import condition
from tests.constraints.tiny import TinyVocabulary, ascending

TOKENS = ["a", "b", "ab", "<stop>", "c"]
PATTERNS = ["a*", "(ab)*c?", "a(b|c){1,3}", "(a|b)*b(a|b)", "(?!aa)[ab]+", "a?b?c?"]


def distributions(rng: np.random.Generator, length: int, size: int) -> Distributions:
    p = rng.dirichlet(np.full(size, 0.5), length)
    ids = np.tile(np.arange(size), (length, 1))
    entropy = -(p * np.log(p)).sum(1)
    sample = np.array([rng.choice(size, p=row) for row in p])
    return Distributions(
        *ascending(ids, p), lambda some: p[:, some], entropy, p.argmax(1), sample, whole=True
    )


def legal(automaton: Automaton, text: tuple[int, ...], ends_by: int | None) -> bool:
    state = automaton.start
    for at, id_ in enumerate(text):
        if ends_by is not None and at == ends_by and state != END:
            return False
        state = int(automaton.table(np.array([state]), np.array([id_]))[0, 0])
    if ends_by is not None:
        return state == END
    return state != 0


def brute(
    automaton: Automaton, seen: Distributions, ends_by: int | None
) -> dict[tuple[int, ...], float]:
    length, size = seen.probabilities.shape
    p = seen.gather(np.arange(size))
    return {
        text: float(np.prod(p[np.arange(length), text]))
        for text in itertools.product(range(size), repeat=length)
        if legal(automaton, text, ends_by)
    }


def until_end(automaton: Automaton, text: tuple[int, ...]) -> tuple[int, ...]:
    """A text without what stands after its stop id, which is no text."""
    return text[: text.index(3) + 1] if 3 in text else text


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ends_by", [None, 4, 5])
@pytest.mark.parametrize("seed", [1, 2])
def test_sums_and_best_text_equal_every_sequence(
    pattern: str, ends_by: int | None, seed: int
) -> None:
    space = Space()
    automaton = Automaton(space, full_match(space, pattern), TinyVocabulary(TOKENS, [3]))
    rng = np.random.default_rng(seed)
    seen = distributions(rng, 5, len(TOKENS))
    weights = brute(automaton, seen, ends_by)
    result = condition(
        automaton, seen, start=automaton.start, uniforms=rng.random(5), ends_by=ends_by, room=100
    )
    assert result.feasible
    total = sum(weights.values())
    marginals = np.zeros((5, len(TOKENS)))
    for text, weight in weights.items():
        marginals[np.arange(5), text] += weight / total
    p = seen.gather(np.arange(marginals.shape[1]))
    found = np.zeros_like(marginals)
    assert result.left_out == 0
    for at in range(5):
        np.add.at(found[at], result.ids[at], result.weights[at])
        found[at] += result.plain[at] * p[at]
    np.testing.assert_allclose(found, marginals, atol=1e-6)
    entropy = -(marginals * np.log(np.maximum(marginals, 1e-300))).sum(1)
    np.testing.assert_allclose(result.entropy, entropy, atol=1e-5)
    # A text with its end: what stands after is summed over.
    by_text: dict[tuple[int, ...], float] = {}
    for text, weight in weights.items():
        short = until_end(automaton, text)
        by_text[short] = by_text.get(short, 0) + weight
    best = max(by_text.values())
    assert by_text[until_end(automaton, tuple(result.draft.tolist()))] == pytest.approx(best)


def test_draws_have_the_conditioned_frequencies() -> None:
    space = Space()
    automaton = Automaton(space, full_match(space, "(ab)*c?"), TinyVocabulary(TOKENS, [3]))
    rng = np.random.default_rng(5)
    seen = distributions(rng, 3, len(TOKENS))
    weights = brute(automaton, seen, 3)
    total = sum(weights.values())
    expected: dict[tuple[int, ...], float] = {}
    for text, weight in weights.items():
        short = until_end(automaton, text)
        expected[short] = expected.get(short, 0) + weight / total
    count = 4000
    drawn: dict[tuple[int, ...], int] = {}
    for _ in range(count):
        result = condition(
            automaton, seen, start=automaton.start, uniforms=rng.random(3), ends_by=3
        )
        short = until_end(automaton, tuple(result.sample.tolist()))
        drawn[short] = drawn.get(short, 0) + 1
    assert drawn.keys() <= expected.keys()
    for text, share in expected.items():
        error = 4 * np.sqrt(share * (1 - share) / count) + 1e-3
        assert abs(drawn.get(text, 0) / count - share) < error


def test_everything_leaves_the_distributions_as_they_are() -> None:
    space = Space()
    automaton = Automaton(space, space.anything, TinyVocabulary(TOKENS, [3]))
    seen = distributions(np.random.default_rng(0), 6, len(TOKENS))
    result = condition(automaton, seen, start=automaton.start, uniforms=np.zeros(6), ends_by=6)
    np.testing.assert_array_equal(result.draft, seen.argmax)
    np.testing.assert_array_equal(result.sample, seen.sample)
    np.testing.assert_array_equal(result.entropy, seen.entropy.astype(np.float32))
    assert (result.plain == 1).all()
    assert not result.weights.any()


def test_a_text_too_long_for_its_room_is_the_beginning_of_one() -> None:
    space = Space()
    automaton = Automaton(space, full_match(space, "a{9}"), TinyVocabulary(TOKENS, [3]))
    seen = distributions(np.random.default_rng(0), 4, len(TOKENS))
    result = condition(automaton, seen, start=automaton.start, uniforms=np.zeros(4), ends_by=4)
    assert not result.feasible
    assert result.draft.tolist() == [0, 0, 0, 0]
