"""Several processes on MLX's ring over the loopback, as `mlx.launch` starts them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

_OF_THE_RING = re.compile(r"(Receiving from|Sending to|Socket\b|Too many send)")


def free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start(
    command: Sequence[str],
    size: int,
    folder: Path,
    *,
    arguments: Sequence[Sequence[str]] | None = None,
    folders: Sequence[Path] | None = None,
) -> list[subprocess.Popen[str]]:
    """The processes of all ranks. arguments: more of the command line, by rank. folders: where each
    rank works."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    return [
        subprocess.Popen(
            [*command, *(arguments[rank] if arguments else ())],
            cwd=folders[rank] if folders else None,
            env={
                **os.environ,
                "MLX_HOSTFILE": str(hosts),
                "MLX_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[str, str]]:
    """(stdout, stderr) by rank once all have ended; none is left where that takes too long."""
    deadline = time.monotonic() + timeout
    try:
        return [one.communicate(timeout=deadline - time.monotonic()) for one in processes]
    finally:
        for one in processes:
            if one.poll() is None:
                one.kill()
                one.wait()


def said(errors: str) -> list[str]:
    """Lines of standard error, without what the threads of MLX's ring write among them."""
    lines = [line.replace("[ring]", "").strip() for line in errors.splitlines()]
    return [line for line in lines if line and not _OF_THE_RING.match(line)]
