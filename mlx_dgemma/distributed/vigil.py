"""The program beside a process of several until all compute together: who is here, and who is lost?

`meeting.py` starts it, for MLX connects with the interpreter held. It knows the standard library
alone. The programs call each other where MLX will (a ring: each its neighbour), and pass on what
they hear, a line of text each: that a rank is "here", "waiting" for MLX's connection, "inside" it,
or has "joined" a team, whose own signs of life count from then on; and the "end" of all, for a rank
and a reason. A port is given back to MLX before it is used by it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

_HELLO = "mlx_dgemma 1"
_STATES = ("here", "waiting", "inside", "joined")
_TOLD = {b"w": "waiting", b"i": "inside", b"j": "joined"}  # by the process, through our input
_HOW = "start all ranks with mlx.launch, as docs/several-macs.md shows"
_SEE = "see what its machine says, and start all again."
_REASONS = {
    "ended": f"Rank {{rank}} ended before all had met: {_SEE}",
    "silent": f"Rank {{rank}} does not answer: {_SEE}",
    "absent": "Rank {rank} has not come within {limit:g} seconds: see what its machine says, and "
    f"{_HOW}.",
    "foreign": "Another program answers at rank {rank}'s address: end it, or choose other ports "
    "with mlx.launch --starting-port.",
    "hosts": f"Rank {{rank}} was started with another host file or number: {_HOW}.",
    "unconnected": "MLX has not connected rank {rank} within {limit:g} seconds: see that nothing "
    "else connects to the ports of the host file, and start all again.",
}
_BETWEEN_BEATS = 1.0
_LONGEST = 4096  # bytes of what came and is no whole line yet
_UNKNOWN = 3.0  # seconds that a connection has to say who it is
_TOGETHER = 0.3  # seconds in which processes end that are interrupted together
_LINGER = 1.0  # seconds for the last words to arrive


@dataclass(eq=False)
class Link:
    """A connection to another rank's program. rank: whose, once it said so. target: whom this end
    called."""

    socket: socket.socket
    target: int | None
    heard: float
    rank: int | None = None
    received: bytes = b""


class Vigil:
    """told: what `meeting.Meeting` hands over."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told
        self._rank, self._size = told["rank"], told["size"]
        self._process, self._go = told["process"], told["go"]
        self._door = None if told["door"] is None else socket.socket(fileno=told["door"])
        self._expected: int = told["accepts"]
        self._targets = {int(rank): place for rank, place in told["targets"].items()}
        self._links: list[Link] = []
        self._known: dict[str, set[int]] = {state: set() for state in _STATES}
        self._known["here"].add(self._rank)
        self._is_waiting = self._gone = False
        self._foreign: set[int] = set()
        self._began = time.monotonic()
        self._went: float | None = None
        self._called = self._beaten = 0.0

    def run(self) -> None:
        """Ends with the process, for the loss of a rank, or once all have joined."""
        while len(self._known["joined"]) < self._size:
            now = time.monotonic()
            self._call(now)
            if now - self._beaten > _BETWEEN_BEATS and not self._is_stopped():
                self._beaten = now
                self._pass_on("beat")
            sources: list[Any] = [0, *(link.socket for link in self._links)]
            if self._door is not None:
                sources.append(self._door)
            ready = select.select(sources, [], [], 0.1)[0]
            if 0 in ready:
                self._hear_process()
            if self._door is not None and self._door in ready:
                with contextlib.suppress(OSError):
                    self._link(self._door.accept()[0], None)
            for link in [link for link in self._links if link.socket in ready]:
                self._hear(link)
            self._look_at_clocks(time.monotonic())
            self._advance()

    def _call(self, now: float) -> None:
        """Connects to the ranks that are to be called and are not yet."""
        if now - self._called < 0.2:
            return
        self._called = now
        for rank, (host, port) in self._targets.items():
            if any(link.target == rank for link in self._links):
                continue
            with contextlib.suppress(OSError):
                self._link(socket.create_connection((host, port), timeout=0.5), rank)

    def _link(self, opened: socket.socket, target: int | None) -> None:
        opened.settimeout(_LINGER)
        link = Link(opened, target, time.monotonic())
        self._links.append(link)
        self._send(link, f"{_HELLO} {self._rank} {self._told['hosts']}")
        for state, ranks in self._known.items():
            for rank in ranks:
                self._send(link, f"{state} {rank}")

    def _hear_process(self) -> None:
        told = os.read(0, 64)
        for at in range(len(told)):
            state = _TOLD[told[at : at + 1]]
            if state == "waiting":
                self._is_waiting = True
            else:
                self._note(state, self._rank)
        if not told:
            if self._rank in self._known["joined"]:
                sys.exit(0)
            self._gone = True
            self._end(self._rank, "ended")

    def _hear(self, link: Link) -> None:
        try:
            some = link.socket.recv(_LONGEST)
        except OSError:
            some = b""
        if not some:
            self._drop(link)
            if link.rank is not None and link.rank not in self._known["joined"]:
                self._end(link.rank, "ended")
            return
        link.heard = time.monotonic()
        *lines, link.received = (link.received + some).split(b"\n")
        for line in lines:
            words = line.decode("ascii", "replace").split(" ")
            if link.rank is not None:
                self._take(link, words)
            elif not self._greets(link, words):
                self._drop(link)
                return
        if link.rank is None and len(link.received) > len(_HELLO) + 100:
            self._drop(link)

    def _greets(self, link: Link, words: list[str]) -> bool:
        if len(words) != 4 or " ".join(words[:2]) != _HELLO or not words[2].isdigit():
            return False
        link.rank = int(words[2])
        expected = link.target in (None, link.rank) and link.rank != self._rank
        if words[3] != self._told["hosts"] or not expected:
            self._end(link.rank or self._rank, "hosts")
        return True

    def _take(self, link: Link, words: list[str]) -> None:
        if len(words) >= 2 and words[1].isdigit() and int(words[1]) < self._size:
            if words[0] in _STATES:
                self._note(words[0], int(words[1]), link)
            elif words[0] == "end" and words[2:] and words[2] in _REASONS:
                self._end(int(words[1]), words[2], link)

    def _note(self, state: str, rank: int, of: Link | None = None) -> None:
        if rank not in self._known[state]:
            self._known[state].add(rank)
            self._pass_on(f"{state} {rank}", of)

    def _advance(self) -> None:
        """What follows from what is known."""
        if self._door is not None:
            came = sum(link.target is None and link.rank is not None for link in self._links)
            if came >= self._expected:
                self._door.close()
                self._door = None
        linked = {link.target for link in self._links if link.rank is not None}
        if self._is_waiting and self._door is None and linked.issuperset(self._targets):
            self._note("waiting", self._rank)
        if self._went is None and len(self._known["waiting"]) == self._size:
            self._went = time.monotonic()
            _say(self._go, "go")

    def _look_at_clocks(self, now: float) -> None:
        for link in list(self._links):
            silent = now - link.heard
            if link.rank is None and silent > _UNKNOWN:
                self._drop(link)
            elif link.rank is not None and silent > self._told["silence"]:
                self._end(link.rank, "silent")
        missing = set(range(self._size)) - self._known["here"]
        if missing and now - self._began > self._told["limit"]:
            rank = min(missing)
            if self._rank == 0 or rank == 0:
                self._end(rank, "foreign" if rank in self._foreign else "absent")
        apart = set(range(self._size)) - self._known["inside"]
        late = self._went is not None and now - self._went > self._told["limit"]
        if late and apart and self._rank == 0:
            self._end(max(apart), "unconnected")

    def _drop(self, link: Link) -> None:
        link.socket.close()
        self._links.remove(link)
        if link.rank is None and link.target is not None:
            self._foreign.add(link.target)

    def _pass_on(self, line: str, of: Link | None = None) -> None:
        for link in self._links:
            if link is not of:
                self._send(link, line)

    def _send(self, link: Link, line: str) -> None:
        with contextlib.suppress(OSError):  # then `_hear` finds its end
            link.socket.sendall(line.encode() + b"\n")

    def _end(self, rank: int, reason: str, of: Link | None = None) -> None:
        """Ends this process for the loss of a rank, after the others were told."""
        self._pass_on(f"end {rank} {reason}", of)
        if not self._gone and not self._is_left_alone():
            self._close_process(rank, reason)
        until = time.monotonic() + _LINGER
        for link in self._links:
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)
        while self._links and (left := until - time.monotonic()) > 0:
            for opened in select.select([link.socket for link in self._links], [], [], left)[0]:
                try:
                    ended = not opened.recv(_LONGEST)
                except OSError:
                    ended = True
                if ended:
                    self._links = [link for link in self._links if link.socket is not opened]
        sys.exit(0)

    def _is_left_alone(self) -> bool:
        """Whether the process has joined a team, or ends by itself at this moment: where all are
        interrupted together, nobody is lost."""
        until = time.monotonic() + _TOGETHER
        while self._rank not in self._known["joined"]:
            left = until - time.monotonic()
            if left <= 0 or not select.select([0], [], [], left)[0]:
                return False
            told = os.read(0, 64)
            if not told:
                return True
            self._known["joined"] |= {self._rank} if b"j" in told else set()
        return True

    def _close_process(self, rank: int, reason: str) -> None:
        """Rank 0 speaks, and where it never came, each for itself."""
        speaks = self._rank == 0 or (rank == 0 and 0 not in self._known["here"])
        why = _REASONS[reason].format(rank=rank, limit=self._told["limit"]) if speaks else ""
        if self._went is None and self._is_waiting and not self._is_stopped():
            _say(self._go, f"no {why}")
            return
        if why and self._told["json"]:
            found = {"error": {"type": "ResourceError", "message": why}}
            _say(1, json.dumps(found))
        elif why:
            _say(2, f"error: {why}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)

    def _is_stopped(self) -> bool:
        """Whether the process is suspended: then it gives no sign of life."""
        try:
            with open(f"/proc/{self._process}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
        except OSError:
            shown = subprocess.run(
                ["/bin/ps", "-o", "stat=", "-p", str(self._process)], capture_output=True
            )
            return shown.stdout.startswith(b"T")


def _say(to: int, line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(to, f"{line}\n".encode())


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process' own
    Vigil(json.loads(sys.argv[1])).run()


if __name__ == "__main__":
    main()
