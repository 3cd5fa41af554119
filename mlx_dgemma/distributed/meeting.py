"""From a process' first moment until it computes with the others: the loss of one ends all.

A small program beside this process keeps the connections (see vigil), so this holds while
MLX is imported, and while it connects with the interpreter held.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mlx_dgemma.errors import ResourceError

LIMIT = 10.0  # seconds for all to come, and for MLX to connect them once all are there
SILENCE = 8.0  # seconds after which a silent process counts as lost
FAILED = 2  # exit code
_PROGRAM = Path(__file__).with_name("vigil.py")


class Meeting:
    """This process among those that are to meet."""

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        door: socket.socket | None,
        accepts: int,
        targets: Mapping[int, tuple[str, int]],
        hosts: str,
    ) -> None:
        """door: where `accepts` other ranks call; it is closed once they have. targets: where this
        one calls others, by rank. hosts: the text that all were started with."""
        self._rank = rank
        answers, go = os.pipe()
        told = {
            **{"rank": rank, "size": size, "process": os.getpid(), "go": go},
            "door": None if door is None else door.fileno(),
            "accepts": accepts,
            "targets": dict(targets),
            "hosts": hashlib.sha256(hosts.encode()).hexdigest()[:16],
            "json": "--json" in sys.argv,
            **{"limit": LIMIT, "silence": SILENCE},
        }
        handed = [go] if door is None else [go, door.fileno()]
        self._vigil = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_PROGRAM), json.dumps(told)],
            stdin=subprocess.PIPE,
            pass_fds=handed,
        )
        os.close(go)
        self._answers = os.fdopen(answers, encoding="utf-8")
        if door is not None:
            door.close()
        threading.Thread(target=self._vigil.wait, daemon=True).start()

    def wait(self) -> None:
        """Until all wait for MLX's connection. Raises ResourceError on rank 0 for a rank that is
        lost or does not come; the other ranks end."""
        self._tell(b"w")
        answer = self._answers.readline().rstrip("\n")
        if answer == "go":
            return
        if not answer.startswith("no"):
            raise ResourceError(
                f"Rank {self._rank} has lost the program that waits for the others: start all "
                "again."
            )
        if why := answer.removeprefix("no").strip():
            raise ResourceError(why)
        sys.exit(FAILED)

    def inside(self) -> None:
        """MLX has connected this process."""
        self._tell(b"i")

    def joined(self) -> None:
        """It is of a team, whose own signs of life count from now on."""
        self._tell(b"j")

    def wait_for_verdict(self) -> None:
        """After an error of MLX's: a rank that is missing ends this process with the better
        sentence. Returns where none is."""
        with suppress(subprocess.TimeoutExpired):
            self._vigil.wait(SILENCE + 2.0)

    def _tell(self, what: bytes) -> None:
        assert self._vigil.stdin is not None
        with suppress(OSError):  # it has ended; then this process is about to, or alone
            self._vigil.stdin.write(what)
            self._vigil.stdin.flush()
