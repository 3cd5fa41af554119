"""From what the launcher hands to this process to MLX's group, with an end to the waiting.

MLX takes its environment at its word and waits for the other processes for as long as it takes,
with the interpreter held: neither Ctrl-C nor a thread ends that. So what can be known to be wrong
is said before, and a small program beside this one watches over the rest (see meeting).
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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING

from mlx_dgemma.distributed.meeting import Meeting
from mlx_dgemma.errors import InputError, ResourceError

if TYPE_CHECKING:
    import mlx.core as mx

WAITING = 60  # seconds for all processes to connect, where no `Meeting` watches over it
_START = "start all ranks with mlx.launch, as docs/several-macs.md shows"
# Ends when its input does, as this process' end of it closes; or after a time, and then both.
_WATCH = """
import os, select, signal, sys
process, seconds, why = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
if not select.select([0], [], [], seconds)[0]:
    os.write(2, why.encode())
    os.kill(process, signal.SIGKILL)
"""


@dataclass(frozen=True)
class Launch:
    """What this process was started with. rank: None where mpirun knows it. hosts: the ring's
    addresses, by rank. coordinator: jaccl's, which all ranks but 0 call; devices: its table."""

    rank: int | None
    hosts: tuple[tuple[str, ...], ...] | None = None
    coordinator: str | None = None
    devices: str | None = None


_meeting: Meeting | None = None


def launched() -> Launch | None:
    """How `mlx.launch` (or mpirun) started this process as one of several; None where it is alone.
    InputError where that cannot be right."""
    given, hosts = os.environ.get("MLX_RANK"), os.environ.get("MLX_HOSTFILE")
    if given is None:
        return Launch(None) if "OMPI_COMM_WORLD_SIZE" in os.environ else None
    read = None
    if hosts is not None:
        read = _read_hosts(Path(hosts))
        if read is not None and len(read) < 2:
            return None
    if not (given.isascii() and given.isdigit()):
        raise InputError(f"MLX_RANK={given!r} is no rank: {_START}.")
    if read is not None:
        return Launch(int(given), hosts=read)
    devices = os.environ.get("MLX_IBV_DEVICES")
    return Launch(int(given), None, os.environ.get("MLX_JACCL_COORDINATOR"), devices)


def arrive() -> None:
    """Shows the other processes that this one is here; at once, for nobody waits long. InputError
    where what it was started with cannot be right, ResourceError for a port that is in use."""
    global _meeting
    launch = launched()
    if _meeting is None and launch is not None:
        _meeting = _meet(launch)


def connect() -> mx.distributed.Group:
    """MLX's group of all processes that `mlx.launch` started, for `load`; of this one alone where
    it did not.

    As `mx.distributed.init()`, which waits for ever for a process that is lost: here that ends all,
    and rank 0 says which. Every process must call this, within 10 seconds of the others.

    Raises InputError where what this process was started with cannot be right, ResourceError where
    the processes cannot connect.
    """
    import mlx.core as mx  # the others know already that this process is here

    launch = launched()
    if launch is None:
        return world()
    arrive()
    who = "This process" if launch.rank is None else f"Rank {launch.rank}"
    try:
        if _meeting is not None:
            _meeting.wait()
            with _plain_interrupt():
                group = mx.distributed.init(strict=True)
            _meeting.inside()
            return group
        with watched(f"{who} has waited {WAITING} seconds for the others: {_START}.", WAITING):
            return mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        wait_for_verdict()
        told = " ".join(str(error).split())
        raise ResourceError(
            f"{who} finds no other process to compute with ({told}): {_START}."
        ) from error


def world() -> mx.distributed.Group:
    """MLX's group, however long that waits; of this process alone where it is, for a host file
    without hosts, as `mlx.launch -n 1` writes it, is an error or the end of the process to MLX."""
    import mlx.core as mx

    hosts = os.environ.pop("MLX_HOSTFILE", None) if launched() is None else None
    try:
        return mx.distributed.init()
    finally:
        if hosts is not None:
            os.environ["MLX_HOSTFILE"] = hosts


def joined() -> None:
    """This process is of a team, which watches from here on."""
    if _meeting is not None:
        _meeting.joined()


def wait_for_verdict() -> None:
    """After an error of MLX's before all have joined, as `Meeting.wait_for_verdict`."""
    if _meeting is not None:
        _meeting.wait_for_verdict()


def addresses() -> list[str]:
    """Rank 0's, as MLX connects to them."""
    with suppress(InputError):
        launch = launched()
        if launch is not None and launch.hosts is not None:
            return [place.rpartition(":")[0] for place in launch.hosts[0]]
        if launch is not None and launch.coordinator is not None:
            return [launch.coordinator.rpartition(":")[0]]
    return []


def _meet(launch: Launch) -> Meeting | None:
    """None where the processes do not know each other's addresses, as under mpirun."""
    if launch.rank is not None and launch.hosts is not None:
        rank, size = launch.rank, len(launch.hosts)
        door = _check_ring(launch.hosts, rank)
        right = (rank + 1) % size
        target = {right: _parted(launch.hosts[right][0])}
        text = json.dumps(launch.hosts)
        return Meeting(rank, size, door=door, accepts=1, targets=target, hosts=text)
    if launch.rank is not None and launch.coordinator is not None and launch.devices is not None:
        rank, place = launch.rank, launch.coordinator
        with suppress(OSError, ValueError):
            text = Path(launch.devices).read_text(encoding="utf-8")
            size = len(json.loads(text))
            if _is_address(place) and rank < size and size > 1:
                return Meeting(
                    rank,
                    size,
                    door=socket.create_server(_parted(place), backlog=size) if rank == 0 else None,
                    accepts=size - 1 if rank == 0 else 0,
                    targets={} if rank == 0 else {0: _parted(place)},
                    hosts=text + place,
                )
    return None


@contextmanager
def watched(why: str, seconds: float) -> Iterator[None]:
    """Ends this process with a sentence where what is within takes longer; Ctrl-C ends it too."""
    command = [sys.executable, "-I", "-S", "-c", _WATCH]
    watch = subprocess.Popen(
        [*command, str(os.getpid()), str(seconds), f"error: {why}\n"], stdin=subprocess.PIPE
    )
    try:
        with _plain_interrupt():
            yield
    finally:
        assert watch.stdin is not None
        watch.stdin.close()
        watch.wait()


@contextmanager
def _plain_interrupt() -> Iterator[None]:
    """Within it Ctrl-C ends this process, whoever holds the interpreter."""
    of_the_main_thread = current_thread() is main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if of_the_main_thread else None
    try:
        yield
    finally:
        if of_the_main_thread:
            signal.signal(signal.SIGINT, before)


@cache
def _read_hosts(path: Path) -> tuple[tuple[str, ...], ...] | None:
    """The addresses of every rank; of one process `mlx.launch` writes an empty file, which is
    none."""
    try:
        text = path.read_text(encoding="utf-8")
        hosts = json.loads(text) if text.strip() else []
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
    return tuple(map(tuple, hosts))


def _are_addresses(entry: object) -> bool:
    return isinstance(entry, list) and bool(entry) and all(map(_is_address, entry))


def _is_address(place: object) -> bool:
    host, _, port = place.partition(":") if isinstance(place, str) else ("", "", "")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16


def _check_ring(hosts: tuple[tuple[str, ...], ...], rank: int) -> socket.socket:
    """This rank's first port, where its neighbour is awaited. Refuses a rank that is not there,
    addresses that are unknown or come twice, and a port of this rank that is in use."""
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
    for place in hosts[(rank + 1) % size]:
        _found(place, (rank + 1) % size)
    doors = [_opened(place, rank) for place in hosts[rank]]
    for door in doors[1:]:
        door.close()
    return doors[0]


def _opened(place: str, rank: int) -> socket.socket:
    found = _found(place, rank)
    try:
        return socket.create_server(found, backlog=8)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"The host file's address of rank {rank}, {place}, is none of the machine "
                f"{socket.gethostname()}, on which this rank was started: check it."
            ) from None
        # Not `strerror`, to which Python adds the address.
        raise ResourceError(
            f"Rank {rank} cannot use {place} ({os.strerror(error.errno or 0)}): end the program "
            "that has this port, or choose another with mlx.launch --starting-port."
        ) from None


def _found(place: str, rank: int) -> tuple[str, int]:
    """Its numbers."""
    try:
        known = socket.getaddrinfo(*_parted(place), socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        raise InputError(
            f"The host file's address of rank {rank}, {place}, is unknown: check it."
        ) from None
    return str(known[0][4][0]), int(known[0][4][1])


def _parted(place: str) -> tuple[str, int]:
    host, _, port = place.partition(":")
    return host, int(port)
