"""Holes that are held to a language: fillings in it, both sides to the character."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from mlx_dgemma import Constraint, infill, load
from mlx_dgemma.cli.infill import main
from mlx_dgemma.errors import InputError, LanguageError
from mlx_dgemma.prompt.holes import Hole

Demo = tuple[Any, Any]
SIDES = ("the small cat ", " the dog in the garden.")


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load()


@pytest.mark.parametrize("pattern", ["[a-z]{5}", "(?:help|see)s", "é[xyz]{2} \\d", "[A-Z]"])
@pytest.mark.parametrize("sides", [SIDES, ("", ""), ("cat", "s and dogs")])
def test_a_filling_matches_its_pattern(demo: Demo, pattern: str, sides: tuple[str, str]) -> None:
    """Also where the hole takes over the edge of a word, on either side."""
    hole = Hole(constraint=Constraint.regex(pattern))
    found = infill(*demo, [sides[0], hole, sides[1]], seed=1, n=2, max_denoising_steps=3)
    for one in (found, *found.alternatives):
        assert re.fullmatch(pattern, one.fillings[0].text)
        assert one.text == f"{sides[0]}{one.fillings[0].text}{sides[1]}"


def test_a_preset_that_rests_positions_leaves_a_held_canvas_whole(demo: Demo) -> None:
    parts = [SIDES[0], Hole(constraint=Constraint.regex("[a-z]{3,5}")), SIDES[1]]
    for preset in ("balanced", "turbo"):
        found = infill(*demo, parts, seed=2, preset=preset)
        assert re.fullmatch("[a-z]{3,5}", found.fillings[0].text)


def test_two_holes_have_languages_of_their_own_and_one_has_none(demo: Demo) -> None:
    age = {"type": "integer", "minimum": 20, "maximum": 29}
    parts = ['{"name": "', Hole(2, 3), '", "age": ', Hole(constraint=Constraint.json_schema(age)),
             ', "pet": "', Hole(constraint=Constraint.choice(["cat", "dog"])), '"}']  # fmt: skip
    prompt = "Write JSON with name, age and pet."
    found = infill(*demo, parts, prompt=prompt, seed=1, max_denoising_steps=4)
    jsonschema.validate(json.loads(f"{found.fillings[1].text}"), age)
    assert found.fillings[2].text in ("cat", "dog")
    assert found.text.startswith('{"name": "')


def test_what_cannot_be_filled_is_one_sentence(demo: Demo) -> None:
    long = Hole(2, 2, constraint=Constraint.choice(["supercalifragilisticexpialidocious"]))
    with pytest.raises(InputError, match="has 2 to 3 tokens: it takes"):
        infill(*demo, ["a ", long, " b"], seed=1)
    with pytest.raises(InputError, match="fits the canvas"):
        infill(*demo, ["a ", Hole(constraint=Constraint.regex("[A-Z]{99}")), " b"], seed=1)
    with pytest.raises(LanguageError, match="No text"):
        infill(*demo, ["a ", Hole(constraint=Constraint.regex("(?!a)a")), " b"], seed=1)
    with pytest.raises(InputError, match=r"use Constraint\.regex"):
        infill(*demo, ["a ", Hole(constraint="[a-z]"), " b"], seed=1)


def test_the_terminal_holds_every_hole(capsys: pytest.CaptureFixture[str]) -> None:
    text = "the small cat <hole> the dog in the garden."
    assert main([text, "--regex", "[a-z]{4}", "--seed", "1", "--fill-only"]) == 0
    assert re.fullmatch("[a-z]{4}", capsys.readouterr().out.strip())
    assert main(["the cat", "--edit", "0:3", "--regex", "a"]) == 2
    assert "for holes" in capsys.readouterr().err
