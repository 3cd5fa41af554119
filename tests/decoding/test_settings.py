"""One record of decoding settings: signature, keywords, flags and request fields agree with it."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest

from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.decoding.settings import (
    DecodingOptions,
    DecodingSettings,
    Setting,
    settings_by_name,
)
from mlx_dgemma.errors import InputError
from mlx_dgemma.generate import Options, stream_generate
from mlx_dgemma.server.accepted import Bounds, shared
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields

NAMES = [one.name for one in fields(DecodingSettings)]


def without_none(annotation: Any) -> tuple[Any, ...]:
    """The types of an annotation, None apart."""
    choices = get_args(annotation) if NoneType in get_args(annotation) else (annotation,)
    return tuple(one for one in choices if one is not NoneType)


def test_every_setting_has_its_record() -> None:
    assert list(settings_by_name()) == NAMES
    for name, known in settings_by_name().items():
        default = getattr(DecodingSettings(), name)
        assert known.allows(default), name
        assert known.expected or name == "t_min"  # whose bounds depend on t_max
        assert known.expected == "" or len(known.expected) < 50


def test_the_public_signature_names_every_setting_with_its_type() -> None:
    signature = inspect.signature(stream_generate)
    public = get_type_hints(stream_generate)
    record = get_type_hints(DecodingSettings)
    assert [name for name in NAMES if name not in signature.parameters] == []
    for name in NAMES:
        assert without_none(public[name]) == without_none(record[name]), name
        default = signature.parameters[name].default
        # None takes the checkpoint's, or this machine's; else the record's own default
        assert default is None or default == getattr(DecodingSettings(), name), name


def test_the_keywords_are_those_of_the_signature() -> None:
    assert sorted(DecodingOptions.__annotations__) == sorted([*NAMES, "preset"])
    own = {"model", "tokenizer", "prompt", "drafts", "cancel"}  # not passed on
    assert set(Options.__annotations__) == set(inspect.signature(stream_generate).parameters) - own
    hints, public = get_type_hints(Options), get_type_hints(stream_generate)
    assert {name: hints[name] for name in hints} == {name: public[name] for name in hints}


def test_every_described_setting_is_a_flag() -> None:
    parser = argparse.ArgumentParser()
    flags.add_decoding(parser)
    shown = {action.dest: action for action in parser._actions}
    described = [name for name, known in settings_by_name().items() if known.help]
    assert set(NAMES) - set(described) == {"conditioning", "sliced_head"}
    for name in described:
        assert shown[name].option_strings[0] == f"--{name.replace('_', '-')}"
        assert shown[name].help == settings_by_name()[name].help
    given = parser.parse_args(["--reveal-threshold", "0.8", "-m", "9", "--kv-bits", "8"])
    assert flags.settings(given) == {"reveal_threshold": 0.8, "max_tokens": 9, "kv_bits": 8}


def test_a_request_field_is_read_within_its_bounds() -> None:
    known = shared(Bounds(choices=1, canvas=64, vocabulary=9))
    assert Fields({"t_min": 0.5}, known=known).value("t_min") == 0.5
    assert Fields({}, known=known).value("t_min") is None
    for name, value, words in (
        ("reveal_threshold", 1.5, "from 0 to 1"),
        ("max_denoising_steps", 0, "from 1 to 1024"),
        ("max_denoising_steps", 2.5, "a whole number"),
        ("on_unconverged", "warn", "commit, refuse"),
        ("sampler", 3, "a string"),
        ("canvas_length", 65, "from 1 to 64"),
    ):
        with pytest.raises(ApiError, match=words):
            Fields({name: value}, known=known).value(name)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temp", "warm", "use a number"),
        ("max_tokens", 4.5, "use a whole number"),
        ("kv_bits", 4, "use 8, or None"),
        ("sliced_head", "yes", "use True or False"),
        ("sampler", "ddim", "'entropy-bound' or 'confidence-threshold'"),
        ("t_min", 0.9, "at most t_max=0.8"),
        ("t_max", float("inf"), "a finite number above 0"),
        ("entropy_bound", float("nan"), "0 or more"),
        ("canvas_length", "long", "use 1 or more"),
    ],
)
def test_a_refusal_says_what_to_use(name: str, value: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        DecodingSettings(**{name: value})


def test_an_open_bound_leaves_its_end_out() -> None:
    probability = Setting(low=0, above=True, high=1)
    assert [probability.allows(value) for value in (0, 0.1, 1, 1.1)] == [False, True, True, False]
