"""Replies of the demo checkpoint under constraints, through the public API and the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from mlx_dgemma import Constraint, DGemmaError, Runtime, load, replay, stream_generate
from mlx_dgemma.cli import generate as cli_generate
from mlx_dgemma.cli.generate import main
from mlx_dgemma.constraints import ToolCalls
from mlx_dgemma.decoding.events import Draft, Finish
from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 10, "maximum": 79},
        "pet": {"anyOf": [{"enum": ["cat", "dog"]}, {"type": "null"}]},
    },
    "required": ["name", "age", "pet"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Tokenizer]:
    return load()


def reply(demo: tuple[Any, Tokenizer], prompt: str, **options: Any) -> tuple[str, Finish]:
    *events, finish = stream_generate(*demo, prompt, **options)
    assert isinstance(finish, Finish)
    return "".join(event.text for event in events if not isinstance(event, Draft)), finish


@pytest.mark.parametrize("sampler", ["entropy-bound", "confidence-threshold"])
@pytest.mark.parametrize("conditioning", ["auto", "sparse"])
def test_with_the_language_of_everything_every_step_is_the_unconstrained_one(
    demo: tuple[Any, Tokenizer], sampler: str, conditioning: str
) -> None:
    def drafts(**options: Any) -> list[Any]:
        stream = stream_generate(
            *demo, "Write JSON with name, age and pet.", seed=4, drafts=True, sampler=sampler,
            conditioning=conditioning, **options,
        )  # fmt: skip
        return [event for event in stream if isinstance(event, Draft)]

    free, held = drafts(), drafts(constraint=Constraint.everything())
    assert len(free) == len(held) > 1
    for one, other in zip(free, held, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.accepted, other.accepted)
        np.testing.assert_array_equal(one.entropy, other.entropy)


@pytest.mark.parametrize("preset", ["reference", "balanced", "turbo"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_reply_that_ends_is_in_the_language(
    demo: tuple[Any, Tokenizer], preset: str, seed: int
) -> None:
    text, finish = reply(
        demo, "Write JSON with name, age and pet.", seed=seed, preset=preset,
        constraint=Constraint.json_schema(PERSON),
    )  # fmt: skip
    assert finish.reason == "stop"
    jsonschema.validate(json.loads(text), PERSON)


def test_a_language_goes_on_over_several_blocks(demo: tuple[Any, Tokenizer]) -> None:
    pattern = r"([a-z]{3,8} ){30}end"
    text, finish = reply(
        demo, "Name animals.", seed=1, constraint=Constraint.regex(pattern), max_denoising_steps=4
    )
    assert finish.blocks > 1
    assert finish.reason == "stop"
    assert re.fullmatch(pattern, text)


def test_max_tokens_is_kept_where_a_text_fits_and_reported_where_none_does(
    demo: tuple[Any, Tokenizer],
) -> None:
    text, finish = reply(
        demo, "Count from 1 to 9.", seed=1, max_tokens=6, constraint=Constraint.regex(r"\d( \d)*")
    )
    assert re.fullmatch(r"\d( \d)*", text)
    assert finish.reason == "stop"
    assert finish.generated_tokens <= 6
    text, finish = reply(
        demo, "Count from 1 to 9.", seed=1, max_tokens=3, constraint=Constraint.regex(r"\d{40}")
    )
    assert finish.reason == "length"
    assert re.fullmatch(r"\d{1,39}", text)


def test_a_trace_holds_its_constraint(demo: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    constraint = Constraint.regex("[0-9]{4}")
    text, _ = reply(demo, "Count.", seed=3, constraint=constraint, trace=path)
    again = replay(*demo, path)
    assert (again.text, again.divergence) == (text, None)


def test_a_trace_holds_a_language_and_calls_and_another_kind_is_refused(
    demo: tuple[Any, Tokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    calls = ToolCalls((("t", {"type": "object", "properties": {"a": {"const": 7}}}),), forced=True)
    for constraint in (Constraint.tool_calls(calls), Constraint.choice(["seven"])):
        held = constraint.language(demo[1], demo[0].config.text.vocab_size)
        options: dict[str, Any] = {"constraint": held, "trace": path, "max_denoising_steps": 2}
        _, finish = reply(demo, "Count.", seed=3, **options)
        again = replay(*demo, path)
        assert (len(again.ids), again.divergence) == (finish.generated_tokens, None)
    record = json.loads(path.read_text())
    for wrong in ({"kind": "none", "value": 1}, {"kind": "tool_calls", "value": []}, [1]):
        path.write_text(json.dumps({**record, "constraint": wrong}))
        with pytest.raises(InputError, match="constraint is none"):
            replay(*demo, path)


def test_a_runtime_takes_a_constraint_and_a_bad_one_is_one_sentence() -> None:
    with Runtime() as runtime:
        constraint = Constraint.choice(["yes", "no"])
        assert runtime.generate("Is it?", seed=1, constraint=constraint) in ("yes", "no")
        with pytest.raises(DGemmaError, match="without a '\\)'"):
            runtime.generate("Is it?", constraint=Constraint.regex("(a"))


def test_the_terminal_takes_all_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "person.json"
    schema.write_text(json.dumps(PERSON))
    asked = ["--prompt", "Write JSON with name, age and pet.", "--seed", "1", "--json"]
    assert main([*asked, "--json-schema", str(schema)]) == 0
    jsonschema.validate(json.loads(json.loads(capsys.readouterr().out)["text"]), PERSON)
    assert main([*asked, "--regex", "[0-9]{4}"]) == 0
    assert re.fullmatch("[0-9]{4}", json.loads(capsys.readouterr().out)["text"])
    assert main([*asked, "--choice", "yes", "--choice", "no"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] in ("yes", "no")
    schema.write_text("{")
    assert main([*asked, "--json-schema", str(schema)]) == 2
    assert "not valid JSON" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_the_terminal_says_what_a_reply_may_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = tmp_path / "unique.json"
    schema.write_text(json.dumps({"type": "array", "uniqueItems": True, "minItems": 9}))
    asked = ["--prompt", "Count.", "--seed", "1", "--max-denoising-steps", "1"]
    assert main([*asked, "--json-schema", str(schema), "--max-tokens", "2"]) == 0
    said = capsys.readouterr().err
    assert "No reply is held to uniqueItems" in said
    assert "The reply was cut at 2 tokens" in said
    assert main([*asked, "--regex", "[0-9]", "--enable-thinking"]) == 0
    digit, said = capsys.readouterr()
    assert digit.strip().isdigit()
    assert "without thinking" in said
    monkeypatch.setattr(cli_generate, "open_session", None)  # a mistake is told before the weights
    assert main([*asked, "--regex", "("]) == 2
    assert "without a ')'" in capsys.readouterr().err
