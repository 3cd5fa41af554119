"""What a reply cost, for people and for machines."""

from __future__ import annotations

import json

import pytest

from mlx_dgemma.cli import summary
from tests.cli.fakes import finish


def test_the_line_names_speed_steps_memory_and_seed() -> None:
    assert summary.parts(finish()) == [
        "40 tokens",
        "20.0 tokens/s",
        "3.5 tokens per forward",
        "6.5 steps per block",
        "peak memory 1.24 GB",
        "seed 7",
    ]


def test_what_a_user_should_know_is_said() -> None:
    line = summary.parts(finish(reason="length", converged=(True, False)))
    assert line[0] == "cut at --max-tokens"
    assert line[-1] == "1 block did not converge"
    assert summary.parts(finish(reason="cancelled"))[0] == "cancelled"


def test_the_displays_own_pauses_do_not_count() -> None:
    assert summary.tokens_per_second(finish(), held_seconds=1.0) == 40.0


def test_nothing_generated_divides_by_nothing() -> None:
    empty = finish(
        blocks=0, steps_per_block=(), converged=(), generated_tokens=0, denoise_seconds=0
    )
    assert summary.parts(empty)[1:4] == [
        "0.0 tokens/s",
        "3.5 tokens per forward",
        "0.0 steps per block",
    ]


def test_the_record_is_json_and_has_every_field() -> None:
    record = json.loads(json.dumps(summary.record(finish(), text="hello")))
    assert record["text"] == "hello"
    assert record["steps_per_block"] == [5, 8]
    assert record["finish_reason"] == "stop"
    assert record["tokens_per_second"] == 20.0


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "1 kB"), (310e6, "310 MB"), (1.24e9, "1.24 GB"), (16_542_844_632, "16.5 GB")],
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert summary.size(count) == text
