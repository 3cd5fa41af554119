"""Many clients at once: some leave, some send nonsense; nobody else notices."""

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

from .conftest import Script, user
from .test_clients import running, settled

CLIENTS = 50
REQUESTS = 3
REPLY = "word " * 4


def test_fifty_clients_some_of_whom_misbehave() -> None:
    script = Script(REPLY, pause=0.01)
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def note(outcome: str) -> None:
        with lock:
            outcomes[outcome] += 1

    def behave(url: str, seed: int) -> None:
        rng = random.Random(seed)
        chat = f"{url}/v1/chat/completions"
        with httpx2.Client(timeout=60) as client:
            for _ in range(REQUESTS):
                stream = rng.random() < 0.5
                body: dict[str, Any] = {"messages": user(), "stream": stream, "seed": seed}
                what = rng.choice(["ask", "ask", "leave", "malformed", "oversized"])
                if what == "ask":
                    answer = client.post(chat, json=body)
                    if answer.status_code == 429:
                        assert answer.headers["retry-after"]
                        note("429")
                        continue
                    assert answer.status_code == 200
                    assert answer.text.count("word") == 4
                    assert stream == ("[DONE]" in answer.text)
                    note("answered")
                elif what == "leave":
                    try:
                        client.post(chat, json=body, timeout=rng.uniform(0.01, 0.2))
                        note("stayed")
                    except httpx2.TimeoutException:
                        note("left")
                elif what == "malformed":
                    broken = rng.choice([b"{", b"[]", b'{"messages": 3}', b"\xff\xfe"])
                    json_type = {"content-type": "application/json"}
                    answer = client.post(chat, content=broken, headers=json_type)
                    assert answer.status_code in (400, 429)  # before the body is read
                    note("refused")
                else:
                    big = {"messages": user("x" * 20_000)}
                    assert client.post(chat, json=big).status_code in (413, 429)
                    note("refused")

    failures: list[BaseException] = []

    def guarded(url: str, seed: int) -> None:
        try:
            behave(url, seed)
        except BaseException as error:
            failures.append(error)

    limits = {"max_concurrent": 8, "max_waiting": 30, "max_body_bytes": 10_000}
    with running(script, prefix_cache_bytes=0, **limits) as url:
        threads = [threading.Thread(target=guarded, args=(url, i)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        settled(url)
        assert httpx2.post(f"{url}/v1/chat/completions", json={"messages": user()}).is_success
    assert outcomes["answered"] > 0
    assert outcomes["left"] > 0
    assert sum(outcomes.values()) == CLIENTS * REQUESTS


def test_the_load_script_finds_nothing_wrong() -> None:
    """The demo model under a few seconds of what studies/server_load.py does for minutes."""
    script = Path(__file__).parents[2] / "studies" / "server_load.py"
    command = [sys.executable, str(script), "--seconds", "4", "--clients", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == []
    assert result["outcomes"]["answered"] > 0
    assert result["growth"] < 0.25  # a few seconds warm up less than a few minutes
