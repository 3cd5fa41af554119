"""Requests of real clients, damaged by the mutations of AFL's havoc stage.

Nothing here knows what a field means. A request begins as one that a client library sent
(`recorded_requests.jsonl`, recorded from the tests of the clients).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))
from havoc import Havoc  # studies/havoc.py

CORPUS = Path(__file__).with_name("recorded_requests.jsonl")
PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/v1/messages/count_tokens", "/v1/systemone"),
)
_JSON = {"content-type": "application/json"}


@cache
def corpus() -> tuple[tuple[str, bytes], ...]:
    """(path, body) of every recorded request."""
    lines = CORPUS.read_text().splitlines()
    return tuple((path, body.encode()) for path, body in map(json.loads, lines))


def requests(seed: int) -> Iterator[tuple[str, str, dict[str, str], bytes]]:
    """(method, path, headers, body), without an end."""
    rng = random.Random(seed)
    havoc = Havoc(body for _, body in corpus())
    while True:
        path, body = rng.choice(corpus())
        if path == "/v1/systemone" and rng.random() < 0.8:  # a model decides, and takes its time
            continue
        if rng.random() < 0.75:
            body = havoc.tokenwise(rng, body)
        if rng.random() < 0.2:
            body = havoc.bytewise(rng, body)
        if rng.random() < 0.08:
            path = rng.choice(PATHS)
        yield "POST", path, _JSON, body
