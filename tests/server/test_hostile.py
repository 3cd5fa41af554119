"""Thousands of requests that nobody should send: answered in time, in words, and nothing else.

MLX_DGEMMA_HOSTILE_REQUESTS sets how many, MLX_DGEMMA_HOSTILE_SEED which.
"""

import asyncio
import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_dgemma.infilling import Filling, Infill
from mlx_dgemma.server import engine as engine_module
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import ServerSettings

from . import hostile
from .conftest import Script, user

COUNT = int(os.environ.get("MLX_DGEMMA_HOSTILE_REQUESTS", "20000"))
SEED = int(os.environ.get("MLX_DGEMMA_HOSTILE_SEED", "1"))
REPLY = 'A reply.<|tool_call>call:look{q:<|"|>x<|"|>}<tool_call|>'


def _filled(_m: Any, _t: Any, parts: Any, **_: Any) -> Iterator[Any]:
    text = "".join(part if isinstance(part, str) else "1" for part in parts)
    yield Infill(text, (Filling("1", (0, 1), 1, ()),), 0.0, 0, 1, True, 1)


@pytest.mark.slow
def test_no_request_breaks_a_bound(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_module, "infill_turns", _filled)
    caplog.set_level(logging.WARNING)
    script = Script(REPLY)
    # What the script remembers of its requests is not the server's memory.
    monkeypatch.setattr(script, "seen", deque(maxlen=4))
    app = create_app(script, ServerSettings(prefix_cache_bytes=0))
    control = ("/v1/chat/completions", json.dumps({"messages": user()}).encode(), b'"A reply."')
    seen = asyncio.run(hostile.run(app, SEED, COUNT, control))
    print(f"{COUNT} requests, seed {SEED}: {dict(seen.statuses)}, slowest {seen.slowest:.2f} s, "
          f"loop blocked {seen.blocked:.3f} s, {seen.memory >> 20} MB")  # fmt: skip
    assert not seen.problems, "\n".join(seen.problems[:10])
    assert seen.blocked < hostile.BLOCKED_SECONDS
    assert seen.memory < hostile.MEMORY
    assert "Traceback" not in caplog.text
    assert seen.statuses[200] > COUNT // 50  # the damage does not end every request at the door
