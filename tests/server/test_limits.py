"""The table of limits in docs/server.md holds the numbers of the code."""

from __future__ import annotations

import time
from pathlib import Path

from mlx_dgemma.prompt import download, pictures, sandbox
from mlx_dgemma.server import accepted, bodies, connections, request_images, tool_kinds, validation
from mlx_dgemma.server.endpoints import openai_responses
from mlx_dgemma.server.engine import Engine
from mlx_dgemma.server.metrics import Metrics
from mlx_dgemma.server.settings import SERVER_ACCESS, ServerSettings

from .conftest import Script

DOCS = Path(__file__).parents[2] / "docs" / "server.md"


def test_the_documented_limits_are_those_of_the_code() -> None:
    own = ServerSettings()
    cap = (
        tool_kinds.MAX_TOOLS,
        request_images.MAX_IMAGES,
        request_images.MAX_IMAGES,
        openai_responses.MOST_METADATA,
    )
    expected = {
        "body": [f"{own.max_body_bytes >> 20} MB"],
        "values in a body, depth": [f"{bodies._PARTS:,}, 64"],
        "bodies and images of all requests together": [f"{own.max_request_memory >> 20} MB"],
        "reply": [f"{own.max_output_tokens:,} tokens"],
        "requests that take turns, that wait": [f"{own.max_concurrent}, {own.max_waiting}"],
        "time of a reply": [f"{own.max_seconds:.0f} s"],
        "`n`, stop strings": [f"{own.max_choices}, {accepted.MAX_STOP_STRINGS}"],
        "tools, images, assets, metadata of a response": [", ".join(f"{n:,}" for n in cap)],
        "pixels of an image": [f"{pictures.MAX_PIXELS // 10**6} million"],
        "image from a URL": [
            f"{SERVER_ACCESS.max_bytes >> 20} MB",
            f"{SERVER_ACCESS.seconds:.0f} s",
            f"{download.MAX_REDIRECTS} redirects",
        ],
        "schema": [f"{validation._MAX_DEPTH} deep", f"{validation.MOST_SCHEMAS:,} subschemas"],
        "time of a chat template": [f"{sandbox.SECONDS:.0f} s"],
        "headers": [f"{connections.HEADER_SECONDS:.0f} s"],
        "unread answer": [f"{connections.WRITE_SECONDS:.0f} s"],
        "connections, of one address": [
            f"{connections.MOST_CONNECTIONS}, {connections.MOST_FROM_ONE_ADDRESS}"
        ],
        "contexts in memory, on disk": [
            f"{own.prefix_cache_bytes >> 30} GB", f"{own.prompt_cache_dir_bytes >> 30} GB"],
    }  # fmt: skip
    rows = [line.strip("|").split("|") for line in DOCS.read_text().splitlines() if "|" in line]
    told = {row[0].strip(): row[1] for row in rows if len(row) == 4}
    slow = rows[[row[0].strip() for row in rows].index("headers") + 1]
    assert slow[0].strip() == "body"
    assert f"{bodies._SILENCE_SECONDS:.0f} s" in slow[1]
    assert f"{bodies._SLOWEST >> 10} KB/s" in slow[1]
    del expected["body"]
    assert f"| {own.max_body_bytes >> 20} MB | `--max-body-mb` |" in DOCS.read_text()
    for name, numbers in expected.items():
        assert all(number in told[name] for number in numbers), (name, numbers, told[name])


def test_a_server_of_billions_of_places_ends_at_once() -> None:
    """It gave each of them back, one after the other."""
    settings = ServerSettings(max_concurrent=2**31, max_waiting=2**31)
    engine = Engine(Script("ok"), settings, Metrics())
    began = time.process_time()
    engine.stop()
    assert time.process_time() - began < 1
