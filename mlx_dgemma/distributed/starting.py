"""From what the launcher hands to this process to MLX's group, with an end to the waiting.

MLX takes its environment at its word and waits for the other processes for as long as it takes,
with the interpreter held: neither Ctrl-C nor a thread ends that. So what can be known to be wrong
is said before, and the waiting is watched by a small process beside this one.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread

import mlx.core as mx

from mlx_dgemma.errors import InputError, ResourceError

WAITING = 60  # seconds for all processes to start and connect
_START = "start all ranks with mlx.launch, as docs/several-macs.md shows"
# Ends when its input does, as this process' end of it closes; or after a time, and then both.
_WATCH = """
import os, select, signal, sys
process, seconds, why = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
if not select.select([0], [], [], seconds)[0]:
    os.write(2, why.encode())
    os.kill(process, signal.SIGKILL)
"""


def launched() -> bool:
    """Whether `mlx.launch` (or mpirun) started this process as one of several."""
    if os.environ.get("MLX_RANK") is None and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return False
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts is not None:  # of one process `mlx.launch` writes an empty one
        with suppress(OSError, UnicodeDecodeError, InputError):
            text = Path(hosts).read_text(encoding="utf-8").strip()
            return bool(text) and len(_read_hosts(Path(hosts))) > 1
    return True


def connected() -> mx.distributed.Group:
    """MLX's group of all processes, once they are there. InputError where what this process was
    started with cannot be right, ResourceError where MLX cannot connect it."""
    hosts, given = os.environ.get("MLX_HOSTFILE"), os.environ.get("MLX_RANK")
    who = "This process" if given is None else f"Rank {given}"
    if given is not None and not (given.isascii() and given.isdigit()):
        raise InputError(f"MLX_RANK={given!r} is no rank: {_START}.")
    if hosts is not None and given is not None:
        _check_ring(_read_hosts(Path(hosts)), int(given))
    with watched(f"{who} has waited {WAITING} seconds for the others: {_START}.", WAITING):
        try:
            return mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ResourceError(
                f"{who} finds no other process to compute with ({told}): {_START}."
            ) from error


@contextmanager
def watched(why: str, seconds: float) -> Iterator[None]:
    """Ends this process with a sentence where what is within takes longer; Ctrl-C ends it too."""
    command = [sys.executable, "-I", "-S", "-c", _WATCH]
    watch = subprocess.Popen(
        [*command, str(os.getpid()), str(seconds), f"error: {why}\n"], stdin=subprocess.PIPE
    )
    of_the_main_thread = current_thread() is main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if of_the_main_thread else None
    try:
        yield
    finally:
        if of_the_main_thread:
            signal.signal(signal.SIGINT, before)
        assert watch.stdin is not None
        watch.stdin.close()
        watch.wait()


def _read_hosts(path: Path) -> list[list[str]]:
    """The addresses of every rank."""
    try:
        hosts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"MLX_HOSTFILE={str(path)!r} cannot be read ({error}): {_START}."
        ) from error
    if isinstance(hosts, dict) or (
        isinstance(hosts, list) and any(isinstance(entry, dict) for entry in hosts)
    ):
        raise InputError(
            f"MLX_HOSTFILE={str(path)!r} is a host file for mlx.launch --hostfile: {_START}."
        )
    if not isinstance(hosts, list) or not all(map(_are_addresses, hosts)):
        raise InputError(
            f"MLX_HOSTFILE={str(path)!r} is no list of the ranks' addresses, each a list like "
            f'["192.168.0.1:32323"]: {_START}.'
        )
    return hosts


def _are_addresses(entry: object) -> bool:
    return isinstance(entry, list) and bool(entry) and all(map(_is_address, entry))


def _is_address(place: object) -> bool:
    host, _, port = place.partition(":") if isinstance(place, str) else ("", "", "")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16


def _check_ring(hosts: list[list[str]], rank: int) -> None:
    """Refuses a rank that is not there, addresses that are unknown or come twice, and a port of
    this rank that is in use."""
    size = len(hosts)
    if rank >= size:
        raise InputError(f"MLX_RANK={rank} is no rank of a host file of {size}: {_START}.")
    places = [place for own in hosts for place in own]
    for index, own in enumerate(hosts):
        if repeated := [place for place in own if places.count(place) > 1]:
            raise InputError(
                f"The host file names {repeated[0]} twice, for rank {index} too: give every rank "
                "an address of its own."
            )
        if len(own) != len(hosts[0]):
            raise InputError(
                f"The host file has {len(own)} addresses for rank {index} and {len(hosts[0])} for "
                "rank 0: give all ranks as many."
            )
    for index in {rank, (rank + 1) % size}:
        for place in hosts[index]:
            _check_place(place, index, own=index == rank)


def _check_place(place: str, rank: int, *, own: bool) -> None:
    host, _, port = place.partition(":")
    try:
        found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)[0][4]
    except OSError:
        raise InputError(
            f"The host file's address of rank {rank}, {place}, is unknown: check it."
        ) from None
    if not own:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(found)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InputError(
                    f"The host file's address of rank {rank}, {place}, is none of the machine "
                    f"{socket.gethostname()}, on which this rank was started: check it."
                ) from None
            raise ResourceError(
                f"Rank {rank} cannot use {place} ({error.strerror}): end the program that has this "
                "port, or choose another with mlx.launch --starting-port."
            ) from None
