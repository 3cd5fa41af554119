"""Many clients at once against the server, some of whom leave or send nonsense, on this machine.

    python studies/server_load.py --seconds 150
    python studies/server_load.py --seconds 5000 --clients 12 --rest 20    # long and light

Starts `mlx_dgemma.server` with the bundled demo checkpoint on a free loopback port, asks a few
questions one after the other, then lets the clients loose with the same questions and seeds. It
fails (exit code 1) if a reply differs from its single run, a request gets no answer or another
than it must, the server's resident memory grows by more than 5 % after the first third, or it has
more open files in the end than before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

GROWTH = 0.05
SPARE_FILES = 8  # connections that are just ending, and the files of threads
PATIENCE = 300.0  # seconds a client waits: the queue is long and the machine may be busy
MAX_BODY = 1 << 20
QUICK = {"max_tokens": 24, "max_denoising_steps": 4, "canvas_length": 16}
QUESTIONS = (
    ("Reverse: garden", 1), ("Sort: d a c b", 2), ("Count from 3 to 9.", 3), ("Hello!", 4),
    ("What is the weather in Rome?", 5), ("Uppercase: river", 6),
)  # fmt: skip
SYSTEM = {"role": "system", "content": "You answer briefly and never leave a question open. " * 4}
MALFORMED = (b"{", b"[]", b'{"messages": 3}', b"\xff\xfe", b'{"messages": [{"role": "elf"}]}')
PATH = "/v1/chat/completions"


@dataclass
class Tally:
    """What the clients saw. outcomes: by kind. problems: what should not have happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, outcome: str, problem: str | None = None) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            if problem is not None:
                self.problems.append(problem)


def body(question: str, seed: int, *, stream: bool) -> dict[str, Any]:
    messages = [SYSTEM, {"role": "user", "content": question}]
    return {"messages": messages, "seed": seed, "stream": stream, "logprobs": True, **QUICK}


def post(port: int, content: bytes, timeout: float = PATIENCE) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", PATH, content, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def tokens(content: bytes, stream: bool) -> list[str]:
    """The committed tokens of a reply, whole or streamed; ValueError when it is not complete."""
    if not stream:
        choices = [json.loads(content)["choices"][0]]
    else:
        lines = [line[6:] for line in content.split(b"\n\n") if line.startswith(b"data: ")]
        if lines[-1] != b"[DONE]":
            raise ValueError("a stream without an end")
        choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    scored = [choice["logprobs"]["content"] for choice in choices if choice.get("logprobs")]
    return [entry["token"] for part in scored for entry in part]


def client(
    port: int, number: int, until: float, rest: float, expected: list[list[str]], tally: Tally
) -> None:
    """Asks, leaves or misbehaves, at random, and rests at most so long, until the time is over."""
    rng = random.Random(number)
    while time.monotonic() < until:
        which = rng.randrange(len(QUESTIONS))
        stream = rng.random() < 0.5
        asked = json.dumps(body(*QUESTIONS[which], stream=stream)).encode()
        what = rng.choice(["ask", "ask", "ask", "leave", "malformed", "oversized"])
        try:
            if what == "leave":
                post(port, asked, timeout=rng.uniform(0.05, 2.0))
                tally.note("stayed")
                time.sleep(rng.uniform(0, rest))
                continue
            if what == "malformed":
                asked = rng.choice(MALFORMED)
            elif what == "oversized":
                asked = b" " * (MAX_BODY + 1)
            status, answer = post(port, asked)
        except TimeoutError:
            tally.note("left", None if what == "leave" else f"{what}: no answer")
            time.sleep(rng.uniform(0, rest))
            continue
        except (OSError, HTTPException) as error:
            tally.note("broken", f"{what}: {error!r}")
            continue
        if status == 429:  # whatever the body is, which is not read then
            tally.note("queue full")
            time.sleep(rng.uniform(0.2, 1.0))
        elif what == "ask" and status == 200:
            same = tokens(answer, stream) == expected[which]
            tally.note("answered", None if same else f"{QUESTIONS[which]} got other tokens")
        else:
            right = status == {"malformed": 400, "oversized": 413}.get(what)
            tally.note("refused", None if right else f"{what}: status {status}")
        time.sleep(rng.uniform(0, rest))


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    listed = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True)
    return int(listed.stdout) << 10


def open_files(pid: int) -> int:
    """How many descriptors a process has open; 0 where nobody says."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


@contextmanager
def server() -> Iterator[tuple[int, int]]:
    """(port, process id) of a server that ends, within a minute, when the block does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlx_dgemma", "server", "--port", str(port)]
    command += ["--max-body-mb", str(MAX_BODY >> 20), "--prefix-cache-mb", "16"]
    command += ["--max-waiting", "40"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            while not _listens(port):
                if process.poll() is not None:
                    log.seek(0)
                    said = log.read()[-2000:].decode(errors="replace")
                    raise SystemExit(f"The server did not start: {said}")
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(60)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def processor_seconds(pid: int) -> float:
    """What a process has computed; 0 where nobody says."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def settled(port: int) -> bool:
    """Whether nothing is left running once all clients are gone."""
    for _ in range(600):
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        if b"mlx_dgemma_requests_admitted 0" in connection.getresponse().read():
            return True
        time.sleep(0.1)
    return False


def measure(seconds: float, clients: int, rest: float) -> dict[str, Any]:
    with server() as (port, pid):
        expected = []
        for question, seed in QUESTIONS:
            status, answer = post(port, json.dumps(body(question, seed, stream=False)).encode())
            assert status == 200, answer
            expected.append(tokens(answer, False))
        tally, opened = Tally(), open_files(pid)
        started = time.monotonic()
        until = started + seconds
        threads = [
            threading.Thread(target=client, args=(port, number, until, rest, expected, tally))
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        sizes: list[tuple[float, int]] = []
        while any(thread.is_alive() for thread in threads):
            sizes.append((time.monotonic() - started, resident(pid)))
            time.sleep(min(1.0, seconds / 20))
        if not settled(port):
            tally.problems.append("requests are left over")
        left_open, computed = open_files(pid), processor_seconds(pid)
        if left_open > opened + SPARE_FILES:
            tally.problems.append(f"{left_open} open files, {opened} before")
    warm = [size for at, size in sizes if at >= seconds / 3]
    return {
        "seconds": round(sizes[-1][0], 1),
        "clients": clients,
        "rest": rest,
        "server_processor_seconds": round(computed, 1),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "problems": tally.problems[:20],
        "open_files_before_and_after": (opened, left_open),
        "memory_after_warm_up": warm[0],
        "memory_at_most": max(warm),
        "memory_mb_by_tenths": [size >> 20 for _, size in sizes[:: max(1, len(sizes) // 10)]],
        "growth": round(max(warm) / warm[0] - 1, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rest", type=float, default=0.2, help="seconds between requests, at most")
    arguments = parser.parse_args()
    result = measure(arguments.seconds, arguments.clients, arguments.rest)
    print(json.dumps(result, indent=2))
    return 1 if result["problems"] or result["growth"] > GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
