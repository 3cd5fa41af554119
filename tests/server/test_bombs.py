"""Schemas, patterns and pictures that ask for more than they weigh stay within the bounds."""

import asyncio
import logging
import os
from itertools import islice
from typing import Any

import pytest

from mlx_dgemma.prompt.chat_template import _ControlEscape

from . import bombs, bounds
from .conftest import tokenizer
from .pauses import Pauses, one_processor

COUNT = int(os.environ.get("MLX_DGEMMA_BOMBS", "100"))
SEED = int(os.environ.get("MLX_DGEMMA_HOSTILE_SEED", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("requests", [bombs.schema_requests, bombs.picture_requests])
def test_bombs_stay_within_the_bounds(requests: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    seen = bounds.check(bounds.scripted_app, islice(requests(SEED), COUNT))
    print(seen)
    assert not seen.broken(), "\n".join(problem[:600] for problem in seen.broken()[:10])
    assert "Traceback" not in caplog.text
    assert seen.statuses[400] > 20
    assert seen.statuses[200] > 20


@pytest.mark.slow
def test_much_of_everything_stays_within_the_bounds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    seen = bounds.check(bounds.scripted_app, bombs.large_requests(SEED))
    print(seen)
    assert not seen.broken(), "\n".join(problem[:300] for problem in seen.broken())
    assert "Traceback" not in caplog.text
    assert seen.statuses[400] >= 16
    assert seen.statuses[200] >= 8


@pytest.mark.parametrize("piece", ["<|", "\u00e9 ", "<turn|>", "word "])
def test_a_long_text_is_searched_and_escaped_in_pieces(piece: str) -> None:
    """Eight million characters, as many as fit the published model; a pattern or a translation
    over all of them at once kept every other thread from running for 0.3 s."""
    text = piece * (8_000_000 // len(piece))

    def use() -> str:
        escape = _ControlEscape(tokenizer(), [{"content": text}])
        (escaped,) = escape.apply([text])
        assert not tokenizer().contains_control(escaped)
        tokenizer().contains_control(text)
        return escape.undo(escaped)

    async def measure() -> tuple[str, float]:
        async with Pauses(bounds.BLOCKED_SECONDS) as pauses:
            returned = await asyncio.to_thread(use)
        return returned, pauses.longest

    with one_processor():
        returned, longest = asyncio.run(measure())
    assert returned == text
    assert longest < 0.15
