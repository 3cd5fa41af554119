"""Schemas, patterns and pictures that ask for more than they weigh stay within the bounds."""

import logging
import os
from itertools import islice
from typing import Any

import pytest

from . import bombs, bounds

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
    assert seen.statuses[400] >= 8
