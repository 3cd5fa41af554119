"""Thousands of requests that nobody should send: answered in time, in words, and nothing else.

MLX_DGEMMA_HOSTILE_REQUESTS sets how many of each kind, MLX_DGEMMA_HOSTILE_SEED which. The long runs
are those of studies/hostile_requests.py.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import pytest

from . import bounds, havoc, hostile

COUNT = int(os.environ.get("MLX_DGEMMA_HOSTILE_REQUESTS", "10000"))
SEED = int(os.environ.get("MLX_DGEMMA_HOSTILE_SEED", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("mutator", [hostile, havoc], ids=["structure", "havoc"])
def test_no_request_breaks_a_bound(mutator: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    seen = bounds.check(bounds.scripted_app, islice(mutator.requests(SEED), COUNT))
    print(seen)
    assert not seen.broken(), "\n".join(seen.broken()[:10])
    assert "Traceback" not in caplog.text
    assert seen.statuses[200] > COUNT // 50  # the damage does not end every request at the door


# The bounds are measured, so they can be broken: one handler for each.


async def _sleeps(scope: Any, receive: Any, send: Any) -> None:
    time.sleep(0.5)
    await _answers(scope, receive, send)


async def _holds_the_interpreter(scope: Any, receive: Any, send: Any) -> None:
    started = time.monotonic()
    await asyncio.to_thread(re.match, "(a+)+$", "a" * 24 + "b")
    assert time.monotonic() - started > 0.3
    await _answers(scope, receive, send)


async def _waits(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.3)
    await asyncio.to_thread(time.sleep, 0.3)
    await _answers(scope, receive, send)


async def _allocates(scope: Any, receive: Any, send: Any) -> None:
    assert bytearray(300 << 20)
    await _answers(scope, receive, send)


async def _answers(
    scope: Any, receive: Any, send: Any, status: int = 200, body: bytes = b"{}"
) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def _fails(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("a bug")


async def _says_nothing(scope: Any, receive: Any, send: Any) -> None:
    await _answers(scope, receive, send, 400, b'{"error": {"message": ""}}')


async def _half_a_number(scope: Any, receive: Any, send: Any) -> None:
    await _answers(scope, receive, send, 200, b'{"a": NaN}')


@pytest.mark.parametrize(
    ("app", "broken"),
    [
        (_sleeps, "stood still"),
        (_holds_the_interpreter, "stood still"),
        (_allocates, "MB more than before"),
        (_fails, "a bug"),
        (_says_nothing, "without a sentence"),
        (_half_a_number, "no JSON"),
        (_waits, None),
        (_answers, None),
    ],
)
def test_what_breaks_a_bound_is_seen(app: Any, broken: str | None) -> None:
    requests = [("POST", "/v1/chat/completions", bounds.JSON, b"{}")]
    seen = bounds.check(lambda: nullcontext(app), requests, None, repeat=bounds.longest_pause)
    found = seen.broken()
    if broken is None:
        assert not found
    else:  # on a slow machine 300 MB take so long to fill that the loop stands still, too
        assert any(broken in one for one in found), found


def test_a_pause_counts_as_it_repeats_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "REPEATS", 1)
    requests = [("POST", "/v1/chat/completions", bounds.JSON, b"{}")]
    seen = bounds.check(partial(nullcontext, _sleeps), requests, None)
    (pause,) = seen.pauses
    assert len(pause.alone) == 1
    assert "stood still" in seen.broken()[0]
    quick_alone = bounds.check(partial(nullcontext, _sleeps), requests, None, repeat=_quick)
    assert quick_alone.pauses[0].alone == (0.01,)
    assert not quick_alone.broken()


def _quick(make: bounds.Make, requests: Sequence[bounds.Request]) -> float:
    return 0.01


def test_the_second_mutator_keeps_enough_of_its_requests() -> None:
    """Many are still JSON, a seed gives the same requests, and the corpus has every path."""
    bodies = [body for *_, body in islice(havoc.requests(4), 400)]
    assert bodies == [body for *_, body in islice(havoc.requests(4), 400)]
    assert sum(bounds._is_json(body) for body in bodies) > 100
    assert {path for path, _ in havoc.corpus()} >= set(havoc.PATHS)
