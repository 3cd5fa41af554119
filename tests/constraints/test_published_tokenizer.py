"""Languages over the published vocabulary: bytes that a token cuts, control ids, white space."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.constraints import Constraint, Language, LanguageError, ToolCalls
from mlx_dgemma.decoding.candidates import Distributions
from mlx_dgemma.decoding.conditioning import Conditioned, condition
from mlx_dgemma.prompt import Tokenizer, load_tokenizer
from tests.constraints.test_schemas import patterns
from tests.constraints.tiny import ascending

CHECKPOINT = Path(__file__).parents[3] / "shared/assets/checkpoint-4bit"
SIZE, STOPS = 262_144, frozenset({1, 106, 50})

pytestmark = pytest.mark.skipif(
    not CHECKPOINT.is_dir(), reason=f"the published tokenizer is not in {CHECKPOINT}"
)


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(CHECKPOINT, STOPS)


@functools.cache
def language(kind: str, value: str) -> Language:
    spec = json.loads(value)
    constraint = {
        "regex": Constraint.regex,
        "choice": Constraint.choice,
        "json": Constraint.json_schema,
    }[kind](spec)
    return constraint.language(tokenizer(), SIZE)


def seen(length: int, seed: int, kind: str = "random") -> Distributions:
    """Logits of 64 ids a position: random ones, control and stop ids alone, or parts of
    characters and white space; every other id has a little of what is left."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        ids = np.array([rng.choice(SIZE, 64, replace=False) for _ in range(length)])
    elif kind == "control":
        some = np.array([*sorted(STOPS), *sorted(tokenizer().control_ids)[:61]])
        ids = np.tile(some, (length, 1))
    else:
        spaces = [tokenizer().encode(text)[0] for text in ("\n", "\n\n", "\t", "  ", "   ", " ")]
        parts = [tokenizer().id_of(f"<0x{byte:02X}>") for byte in (*range(0x80, 0xA0), 0xC3, 0xE2)]
        some = np.array(list(dict.fromkeys([*spaces, *parts])))
        ids = np.tile(some, (length, 1))
    shares = rng.dirichlet(np.full(ids.shape[1], 0.3), length) * 0.9
    return Distributions(
        *ascending(ids, shares),
        lambda some: np.full((length, some.size), 0.1 / SIZE),
        np.full(length, 8.0),
        ids[:, 0],
        ids[:, 1],
        whole=False,
    )


def conditioned(held: Language, length: int, seed: int, kind: str = "random") -> Conditioned:
    rng = np.random.default_rng(seed + 1)
    automaton = held.automaton
    return condition(
        automaton,
        seen(length, seed, kind),
        start=automaton.start,
        uniforms=rng.random(length),
        ends_by=length,
    )


def texts(found: Conditioned) -> list[str]:
    """Draft and sample up to their stop ids, as the tokenizer decodes them."""
    assert found.feasible
    decoded = []
    for ids in (found.draft.tolist(), found.sample.tolist()):
        end = next(at for at, id_ in enumerate(ids) if id_ in STOPS)
        decoded.append(tokenizer().decode(ids[:end]))
    return decoded


ADVERSARIAL = [
    "é{2,5}|日本語?",
    "(?:[àâé]|😀){3}x?",
    r"[ \t\n]{1,6}x[ ]+",
    r"\s+(?:ab|a b|  b)\s*",
    "[^\\x00-\\x7f]{1,4}",
    r"(?:a|ab|abc|abcd)+(?!d)e?",
    ".{3,9}",
    "\U0001f9d1‍\U0001f680|क्षि",
    "<turn\\|>|<0x41>|▁",
]


@pytest.mark.parametrize("kind", ["random", "control", "cut"])
@pytest.mark.parametrize("pattern", ADVERSARIAL)
def test_every_text_matches_whatever_the_logits_ask_for(pattern: str, kind: str) -> None:
    for seed in (1, 2):
        found = conditioned(language("regex", json.dumps(pattern)), 40, seed, kind)
        for text in texts(found):
            assert re.fullmatch(pattern, text), (pattern, text)


@settings(max_examples=25, deadline=None)
@given(patterns, st.integers(0, 2**16))
def test_random_patterns(pattern: str, seed: int) -> None:
    try:
        held = Constraint.regex(pattern).language(tokenizer(), SIZE)
    except LanguageError:
        return
    for text in texts(conditioned(held, 24, seed)):
        assert re.fullmatch(pattern, text), (pattern, text)


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6},
     "n": {"type": "integer", "minimum": -3, "maximum": 120}}, "required": ["name", "n"]},
    {"type": "array", "items": {"enum": ["ü", 'q"', None, 1.5]}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^[Ａ-Ｚ]{2,4}$"},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["random", "control", "cut"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda value: value["type"])
def test_every_text_satisfies_its_schema(schema: Any, kind: str) -> None:
    for seed in (1, 2):
        for text in texts(conditioned(language("json", json.dumps(schema)), 64, seed, kind)):
            jsonschema.validate(json.loads(text), schema)


def test_a_choice_is_one_of_its_texts() -> None:
    choices = ["naïve", "naïf", "日本", " leading", "trailing\n", "a" * 30]
    drawn = set()
    for seed in range(8):
        drawn |= set(texts(conditioned(language("choice", json.dumps(choices)), 40, seed)))
    assert drawn <= set(choices)
    assert len(drawn) > 1


def test_a_forced_call_is_written_with_the_published_markers() -> None:
    tool = ("look", {"type": "object", "properties": {"q": {"type": "string", "maxLength": 4}},
                     "required": ["q"]})  # fmt: skip
    held = Constraint.tool_calls(ToolCalls((tool,), forced=True)).language(tokenizer(), SIZE)
    ids = conditioned(held, 40, 3).draft.tolist()
    names = tokenizer().ids
    end = ids.index(names["etc"])
    assert ids[0] == names["stc"]
    assert ids.count(names["escape"]) % 2 == 0
    text = tokenizer().decode(ids[1:end])
    assert re.match(r"call:look\{q:", text)
