"""Ctrl-C and a request to end while replies are written: answered, within a step, code 130."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from .conftest import user

PATIENCE = 120.0
LONG = {"messages": user("Count from 10 to 99."), "seed": 1, "max_denoising_steps": 1000,
        "max_tokens": 4000, "stability_threshold": 1000, "confidence_threshold": 0}  # fmt: skip


@contextmanager
def started(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and its address."""
    command = [sys.executable, "-m", "mlx_dgemma", "server", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        while not (address := re.search(r"at (http://127\.0\.0\.1:\d+)/v1\n", said)):
            said += process.stderr.readline()
            assert process.poll() is None, said
        yield process, address[1]
    finally:
        process.kill()
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_replies_end_at_the_signal(number: signal.Signals) -> None:
    """One whole, one streamed, and one that waits for its turn."""
    answers: dict[str, Any] = {}
    with started("--max-concurrent", "2") as (process, url):
        began = threading.Event()

        def ask(name: str) -> None:
            with httpx2.Client(timeout=PATIENCE) as client:
                answers[name] = client.post(f"{url}/v1/chat/completions", json=LONG)

        def stream() -> None:
            asked = {**LONG, "stream": True}
            with (
                httpx2.Client(timeout=PATIENCE) as client,
                client.stream("POST", f"{url}/v1/chat/completions", json=asked) as answer,
            ):
                answers["streamed"] = []
                for line in answer.iter_lines():
                    answers["streamed"].append(line)
                    began.set()

        asking = [threading.Thread(target=stream), threading.Thread(target=ask, args=("whole",))]
        for thread in asking:
            thread.start()
        _until_admitted(url, 2)
        assert began.wait(PATIENCE)
        asking.append(threading.Thread(target=ask, args=("waiting",)))
        asking[-1].start()
        _until_admitted(url, 3)
        process.send_signal(number)
        sent = time.monotonic()
        _, said = process.communicate(timeout=PATIENCE)
        took = time.monotonic() - sent
        for thread in asking:
            thread.join()
    assert process.returncode == 130
    assert "Traceback" not in said
    for name in ("whole", "waiting"):
        assert answers[name].status_code == 503
        assert "shutting down" in answers[name].json()["error"]["message"]
    last = [line for line in answers["streamed"] if line][-1]
    assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert took < 10  # on a busy machine; alone it is under one second


def _until_admitted(url: str, count: int) -> None:
    until = time.monotonic() + PATIENCE
    while f"mlx_dgemma_requests_admitted {count}\n" not in httpx2.get(f"{url}/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.02)
