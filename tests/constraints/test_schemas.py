"""Texts of random walks through languages, judged by the jsonschema library and Python's re."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.constraints import (
    Constraint,
    Language,
    LanguageError,
    ToolCalls,
    expressions,
)
from mlx_dgemma.constraints.characters import Characters
from mlx_dgemma.constraints.shortest import shortest_length
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.prompt import Tokenizer, load_tokenizer

TREE: Any = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"type": "integer"},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["v", "kids"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
WITH_A: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED: Any = {"additionalProperties": False}
SCHEMAS: list[Any] = [
    {"type": "integer", "minimum": -12, "exclusiveMaximum": 105},
    {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 999},
    {"type": "number", "minimum": -1.5, "maximum": 2.25},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.01},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "b+c"},
    {"type": "string", "pattern": "^(?!ab)[a-c]{2,5}$", "maxLength": 4},
    {"type": "string", "pattern": '^["\\\\]x\\s$'},
    *({"type": "string", "format": name}
      for name in ("date", "date-time", "email", "uuid", "ipv4", "uri", "time")),
    {"enum": ["a", 1, None, {"x": [1]}], "title": "T", "x-note": 1, "examples": ["a"]},
    {"const": 'q"\\'},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "string", "nullable": True, "enum": ["x"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "string"}], "items": False,
     "minItems": 2},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    {"type": "object", "patternProperties": {"^x": {"type": "null"}},
     "additionalProperties": False},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
     "required": ["b"], "additionalProperties": False},
    {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"k": {"const": "s"}},
                                     "required": ["k"]}]},
    {"oneOf": [{"type": "object", "properties": {"t": {"const": t}, "n": {"type": "integer"}},
                "required": ["t", "n"]} for t in ("p", "q")]},
    {"allOf": [{"type": "object", "properties": {"a": {"minimum": 3}}},
               {"properties": {"a": {"type": "integer", "maximum": 5}}, "required": ["a"]}]},
    TREE,
    True,
    # Each was once given texts that do not satisfy it, or refused.
    *({"type": "string", "pattern": pattern}
      for pattern in ("(^|,)foo(,|$)", "(^a|b)c", "(?!x)^a", "(?i)^[^a-z]$", "^(?=a)|b$")),
    {"allOf": [{"type": "string", "pattern": "a]"}, {"pattern": "^b"}, {"pattern": "c$"}]},
    {"$ref": "#/$defs/a%20b~1c", "$defs": {"a b/c": {"type": "boolean"}}},
    {"type": "object", "properties": {"a": {"$recursiveRef": "#"}}},
    {"type": "string", "maxLength": 1, "not": {"enum": ["\b", "\x7f"]}},
    {"enum": ["a", "bb", 3, 7, 0.5, True], "minLength": 2, "maximum": 3, "multipleOf": 1,
     "not": {"const": True}},
    {"const": "b", "enum": ["a", "b"], "anyOf": [{"pattern": "b"}, {"type": "null"}]},
    {"allOf": [{"const": 1}, {"enum": [True, 1, 2]}]},
    {"not": {"type": ["object", "array", "number"]}},
    {"type": "object", "properties": {"xa": {"type": "string"}}, "required": ["xa", "xb", "y"],
     "patternProperties": {"^x": {"minLength": 2}, "b$": {"maxLength": 3, "type": "string"}}},
    {"type": "object", "patternProperties": {"^x": {"type": "integer"}, "y$": {"const": 1}},
     "additionalProperties": False, "minProperties": 1},
    {"type": "object", "propertyNames": {"const": "k"}, "minProperties": 1},
    {"type": "object", "propertyNames": False},
    {"type": "object", "properties": {"a": True, "bc": True}, "propertyNames": {"minLength": 2},
     "patternProperties": {"d$": {"type": "null"}}},
    {"type": "number", "minimum": 1e-8, "exclusiveMaximum": 2e-8},
    {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
    {"type": "number", "minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38},
    {"type": "number", "multipleOf": 0.25, "exclusiveMinimum": 0.3, "maximum": 2},
    {"type": "integer", "multipleOf": 2.5},
    {"type": "integer", "allOf": [{"multipleOf": 4}, {"multipleOf": 6}], "minimum": 1},
    # What one part of an allOf says of members and items that only another part knows.
    {"allOf": [WITH_A | CLOSED, WITH_A | {"additionalProperties": True},
               {"properties": {"c": {"type": "null"}}}]},
    {"allOf": [WITH_A | {"additionalProperties": {"maximum": 5}},
               {"properties": {"x": {"type": "integer", "minimum": 4}}, "required": ["x"]}]},
    {"allOf": [WITH_A | CLOSED, {"patternProperties": {"^b": {"type": "null"},
                                                       "a": {"minimum": 3}}}]},
    {"allOf": [{"type": "object", "patternProperties": {"^b": {"type": "null"}}} | CLOSED,
               {"properties": {"a": {"type": "integer"}, "bc": {"type": "null"}}}]},
    {"allOf": [{"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}],
                "items": False, "minItems": 1}, {"items": {"minimum": 3}}]},
    {"allOf": [{"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 2},
               {"prefixItems": [{"minimum": 3}, {"const": 7}], "items": False}]},
    WITH_A | {"unevaluatedProperties": False},
    {"allOf": [WITH_A], "properties": {"b": {"type": "null"}}, "unevaluatedProperties": False},
    {"allOf": [WITH_A | {"unevaluatedProperties": False}], "properties": {"b": {"const": 1}}},
    {"anyOf": [WITH_A | {"required": ["a"]}, {"type": "object", "required": ["b"]}],
     "properties": {"b": {"type": "null"}}, "unevaluatedProperties": False},
    {"type": "array", "prefixItems": [{"const": 1}], "unevaluatedItems": False},
    {"type": "string", "format": "email", "pattern": "^[a-z]{3}@"},
    {"anyOf": [{"type": "object", "required": ["a"]} | CLOSED, {"type": "null"}]},
]  # fmt: skip


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(CHECKPOINT, ModelConfig.from_folder(CHECKPOINT).stop_ids)


def walk(language: Language, rng: random.Random, wander: int = 12) -> str:
    """A random text: any legal tokens first, then those that lead to an end."""
    automaton = language.automaton
    ids: list[int] = []
    state = automaton.start
    everything = np.arange(automaton.vocabulary.size)
    ordinary = ~automaton.vocabulary.is_stop
    while True:
        reached = automaton.table(np.array([state]), everything)[0]
        legal = np.flatnonzero((reached > 0) & ordinary)
        if automaton.accepting[state] and (
            not legal.size or len(ids) >= wander or not rng.randrange(4)
        ):
            return tokenizer().decode(ids)
        if len(ids) >= wander:
            nearest = automaton.least[reached[legal]].min()
            legal = legal[automaton.least[reached[legal]] == nearest]
        ids.append(int(rng.choice(legal.tolist())))
        state = int(reached[ids[-1]])


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda value: str(value)[:40])
def test_every_text_satisfies_its_schema(schema: Any) -> None:
    language = Constraint.json_schema(schema).language(tokenizer(), len(tokenizer()))
    assert not language.unchecked
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    plain = {k: v for k, v in schema.items() if k != "nullable"} if schema is not True else True
    for seed in range(25):
        text = walk(language, random.Random(seed))
        value = json.loads(text)
        if value is None and schema is not True and schema.get("nullable"):
            continue
        jsonschema.validate(value, plain, format_checker=checker)


@pytest.mark.parametrize(
    ("schema", "unchecked"),
    [
        ({"type": "null", "const": None}, ()),
        ({"const": "a", "description": "d"}, ()),
        ({"enum": ["a", "bb"], "minLength": 2}, ()),
        ({"enum": [[1], "a"], "minItems": 2}, ("enum",)),
        ({"type": "array", "if": False, "else": {"minItems": 1}}, ("if",)),
        ({"type": "string", "format": "uuid", "pattern": "^[A-Z]$"}, ("format",)),
    ],
)
def test_what_else_is_asked_of_constants_is_checked_later(
    schema: Any, unchecked: tuple[str, ...]
) -> None:
    language = Constraint.json_schema(schema).language(tokenizer(), len(tokenizer()))
    assert language.unchecked == unchecked


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$ref": "#name", "$defs": {"a": {"$anchor": "name"}}}, "only references into itself"),
        ({"$dynamicRef": "#name"}, "only references into itself"),
        ({"properties": {"a": True}, "required": ["b"], "additionalProperties": False}, "forbids"),
        ({"not": {}}, "No text"),
        ({"const": "a", "enum": ["b"]}, "No text"),
        ({"enum": []}, "at least one value"),
        ({"type": "number", "minimum": 1e300}, "more than 40 digits"),
    ],
)
def test_what_has_no_text_is_refused(schema: Any, says: str) -> None:
    assert says in refusal(schema)


def test_names_that_may_come_twice_are_checked_later() -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2}
    assert Constraint.json_schema(schema).language(tokenizer(), 896).unchecked == ("minProperties",)


def test_a_constant_of_another_type_is_no_text() -> None:
    with pytest.raises(LanguageError, match="No text satisfies"):
        Constraint.json_schema({"type": "object", "const": None}).language(tokenizer(), 896)


def test_a_language_that_grows_is_refused_by_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock refused the tools of an agent once in forty requests, while others were served."""
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(hours)))
    tool = {"type": "object", "properties": {"q": {"type": "string"}}}
    Constraint.json_schema(tool).language(tokenizer(), len(tokenizer()))
    with pytest.raises(LanguageError, match="grows too fast"):
        Constraint.regex("((a{1,50}){1,50}){1,4}").language(tokenizer(), len(tokenizer()))


def test_a_language_that_takes_long_to_make_is_refused_by_a_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five tools with a parameter of this kind took 17 seconds (tests/server/bombs.py, seed 8)."""
    monkeypatch.setattr(expressions, "MOST_WORK", 2_000)
    schema = {"type": "number", "minimum": -1e20, "maximum": 1e20}
    with pytest.raises(LanguageError, match="takes too long to prepare"):
        Constraint.json_schema(schema).language(tokenizer(), len(tokenizer()))


def test_what_multiplies_is_refused_in_a_moment() -> None:
    """Twenty lookaheads took 1.6 seconds; a class of 6,000 characters, minutes."""
    letters, some = "abcdefghijklmnopqrst", [f"n{n}" for n in range(300)]
    hostile = [
        Constraint.regex("".join(f"(?=.*{letter})" for letter in letters) + ".*"),
        Constraint.regex("[" + "".join(chr(0x4E00 + 3 * n) for n in range(6000)) + "]+"),
        Constraint.json_schema({"allOf": [{"pattern": f"{a}.*{a}"} for a in letters]}),
        Constraint.json_schema({"type": "number", "minimum": -1e20, "multipleOf": 0.999}),
        Constraint.json_schema({"required": [f"k{n}" for n in range(9000)]}),
        Constraint.json_schema({"properties": {f"n{n}": {"type": "null"} for n in range(4000)}}),
        Constraint.json_schema(
            {"properties": dict.fromkeys(some, True), "anyOf": [{"required": [n]} for n in some]}
        ),
    ]
    started = time.process_time()
    for constraint in hostile:
        with pytest.raises(LanguageError, match="simpler"):
            constraint.language(tokenizer(), len(tokenizer()))
    assert time.process_time() - started < 2 * len(hostile)  # on a busy machine


def test_a_schema_that_holds_a_part_a_billion_times_is_refused_at_once() -> None:
    """As Python shares it; its text would be longer than any memory."""
    schema: Any = {"type": "null"}
    for _ in range(30):
        schema = {"anyOf": [schema, schema]}
    with pytest.raises(LanguageError, match="more than 200000 characters"):
        Constraint.json_schema(schema).check()
    options = [{"const": number} for number in range(100)]
    with pytest.raises(LanguageError, match="joins too many options"):
        Constraint.json_schema({"allOf": [{"anyOf": options}, {"anyOf": options[:-1]}]}).check()


def test_a_name_beside_many_known_ones_is_none_of_them() -> None:
    """Each known name was a condition of its own, and a hundred of them were refused."""
    known = {f"name {number}": {"type": "null"} for number in range(300)}
    schema = {"type": "object", "properties": known, "additionalProperties": {"type": "integer"}}
    language = Constraint.json_schema(schema).language(tokenizer(), len(tokenizer()))
    for seed in range(5):
        jsonschema.validate(json.loads(walk(language, random.Random(seed))), schema)


def test_long_lists_are_made_in_a_moment() -> None:
    """They are looked at where a text reaches them; 5,000 long texts took a second."""
    texts = ["".join(random.Random(n).choices("abcdefghij", k=39)) for n in range(5000)]
    numbers = {"allOf": [{"enum": [*range(3000)]}, {"enum": [*range(1500, 4500)]}]}
    started = time.process_time()
    language = Constraint.choice(texts).language(tokenizer(), len(tokenizer()))
    assert {walk(language, random.Random(seed)) for seed in range(5)} <= {*texts}
    language = Constraint.json_schema(numbers).language(tokenizer(), len(tokenizer()))
    assert 1500 <= int(walk(language, random.Random(1))) < 3000
    assert time.process_time() - started < 4  # on a busy machine


def test_a_list_is_the_same_however_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(50):
        rng = random.Random(seed)
        words = ["".join(rng.choices("ab", k=rng.randrange(6))) for _ in range(rng.randrange(1, 9))]
        space = expressions.Space()
        for many in (2_000, 0):
            monkeypatch.setattr(expressions, "_MANY", many)
            node = space.choice([word.encode() for word in words])
            assert shortest_length(space, node) == min(map(len, words))
            for length in range(7):
                for word in itertools.product("ab", repeat=length):
                    held = space.holds(node, "".join(word).encode())
                    assert held == ("".join(word) in words)


def test_ends_of_a_long_list_are_shared() -> None:
    """A canvas's sums grow with the states: 1,500 texts of 33,390 symbols take no more than 200."""
    space = expressions.Space()
    texts = [f"answer {number} of the list".encode() for number in range(1500)]
    node = space.choice(texts)
    states, stack = {node.number}, [node]
    while stack:
        for move in space.moves(stack.pop()):
            if move.target.number not in states:
                states.add(move.target.number)
                stack.append(move.target)
    assert len(states) < 200
    assert all(space.holds(node, text) for text in texts)
    assert not space.holds(node, b"answer 1500 of the list")


KEYWORDS = """type enum const anyOf oneOf allOf not items prefixItems minItems properties required
additionalProperties patternProperties propertyNames minProperties format pattern maxLength minimum
exclusiveMaximum multipleOf nullable $ref $defs"""


def refusal(schema: Any) -> str:
    """Why a schema is refused; "as asked" for one that is not."""
    try:
        Constraint.json_schema(schema).language(tokenizer(), len(tokenizer()))
    except LanguageError as error:
        return str(error)
    return "as asked"


@pytest.mark.parametrize(
    "value", [None, True, 10**400, float("inf"), [[]], {"\ud800": {}}, {1: 2}], ids=ascii
)
def test_a_keyword_of_any_shape_is_read_or_refused_in_a_sentence(value: Any) -> None:
    for name in KEYWORDS.split():
        plain = {"type": "object", "properties": {"a": {"type": "integer"}}, name: value}
        joined = {"allOf": [{"type": ["string", "array"], "enum": ["a"]}, {name: value}]}
        for schema in (plain, joined):
            found = refusal(schema)
            assert found == "as asked" or len(found) > 20


def test_half_of_a_surrogate_pair_is_written_as_an_escape() -> None:
    schema = {"type": "object", "properties": {"\ud800": {"const": "\udfff"}},
              "required": ["\ud800"]}  # fmt: skip
    language = Constraint.json_schema(schema).language(tokenizer(), len(tokenizer()))
    assert json.loads(walk(language, random.Random(1))) == {"\ud800": "\udfff"}


@pytest.mark.parametrize("texts", [None, "yes", 5, [], ["a", 1]])
def test_a_choice_that_is_no_list_of_texts_is_refused(texts: Any) -> None:
    with pytest.raises(LanguageError, match="list of at least one text"):
        Constraint.choice(texts).language(tokenizer(), len(tokenizer()))


def test_ids_are_walked_as_symbol_by_symbol() -> None:
    """Groups of ids, and sets of symbols that lead a state back to itself, change nothing."""
    for constraint in (
        Constraint.json_object(),
        Constraint.regex(r"[A-Z][a-z]+( [a-z]+){2,9}\."),
        Constraint.regex("[^x]*x.{3}\u00e9+"),
        Constraint.json_schema({"type": "integer", "multipleOf": 7}),
    ):
        automaton = constraint.language(tokenizer(), len(tokenizer())).automaton
        vocabulary, transitions = automaton.vocabulary, automaton.transitions
        states, everything = [automaton.start], np.arange(automaton.vocabulary.size)
        for state in states:
            table = automaton.table(np.array([state]), everything)[0].tolist()
            for id_, found in enumerate(table):
                expected = state
                for symbol in vocabulary.spelling(id_):
                    expected = int(transitions.row(expected)[symbol])
                if vocabulary.is_stop[id_]:
                    expected = 1 if automaton.accepting[state] else 0
                assert found == expected
            fresh = [other for other in sorted({*table}) if other not in (0, 1, *states)]
            states += fresh[: 12 - len(states)]


def test_a_json_object_is_one() -> None:
    language = Constraint.json_object().language(tokenizer(), len(tokenizer()))
    texts = [walk(language, random.Random(seed)) for seed in range(25)]
    assert all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize(
    "pattern",
    ["(?i)[^a-z]{3}", "(?i)[^k\u00e9]", "(?i)[^\u0131]", "(?i)[k-m\u00e9]+", "a?b|^c", "(^a|b)c"],
)
def test_every_text_of_a_pattern_that_once_held_others(pattern: str) -> None:
    language = Constraint.regex(pattern).language(tokenizer(), len(tokenizer()))
    for seed in range(25):
        text = walk(language, random.Random(seed))
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    ("one", "others"),
    [
        ("k", "K\u212a"),
        ("s", "S\u017f"),
        ("\u00e9", "\u00c9"),
        ("i", "I\u0130\u0131"),
        ("\u03c3", "\u03a3\u03c2"),
    ],
)
def test_a_class_without_a_letter_is_without_its_other_cases(one: str, others: str) -> None:
    excluded = Characters.of(one).every_case()
    assert all(other in excluded for other in one + others)
    assert "z" not in excluded


@pytest.mark.parametrize("pattern", [r"\01", r"\x+1", r"\u{}", r"\u{110000}", r"\p{L}", r"a?^b"])
def test_what_a_pattern_cannot_say_is_refused(pattern: str) -> None:
    with pytest.raises(LanguageError, match="regular expression"):
        Constraint.regex(pattern).language(tokenizer(), len(tokenizer()))


def test_half_a_surrogate_pair_is_no_text() -> None:
    """In a schema it is an escape; a choice or the call of a tool has none."""
    with pytest.raises(LanguageError, match="half of a surrogate pair"):
        Constraint.choice(["a", "\ud83d"]).language(tokenizer(), len(tokenizer()))
    parameters = {"type": "object", "properties": {"a": {"enum": ["x", "\ud83d"]}, "\ud83d": True}}
    calls = ToolCalls((("t", {**parameters, "required": ["a"]}),), forced=True)
    language = Constraint.tool_calls(calls).language(tokenizer(), len(tokenizer()))
    assert 'a:<|"|>x<|"|>' in walk(language, random.Random(1))


atoms = st.sampled_from(
    ["a", "b", "[ab]", "[^a]", ".", r"\d", r"\w", r"\s", "é", "(?:ab|c)", r"\."]
)
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{1,3}", "{2}"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
        st.tuples(inner, inner).map(lambda p: f"(?!{p[0]}x){p[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(patterns, st.integers(0, 2**16))
def test_every_text_matches_its_pattern(pattern: str, seed: int) -> None:
    try:
        language = Constraint.regex(pattern).language(tokenizer(), len(tokenizer()))
    except LanguageError:
        return
    text = walk(language, random.Random(seed))
    assert re.fullmatch(pattern, text), (pattern, text)
