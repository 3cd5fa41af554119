"""How the processes that MLX started find each other beside its collectives.

Rank 0 listens on a port that it tells the others, with a secret, through a first collective; where
MLX's own connections are between loopback addresses, so is that port.
"""

from __future__ import annotations

import atexit
import hmac
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import mlx.core as mx

from mlx_dgemma.distributed import starting
from mlx_dgemma.distributed.channel import Channel, LostError, Message
from mlx_dgemma.distributed.team import Follower, Leader, Team, machine_name
from mlx_dgemma.errors import ResourceError

_ROOM = 4096  # bytes of rank 0's introduction
_CONNECTING = 10.0  # seconds for all to come
_MEETING = 600  # seconds for all to come this far, where a program may do other things before
_current: Team | None = None


def current() -> Team | None:
    """The team that this process has joined."""
    return _current


def join(group: mx.distributed.Group | None = None) -> Team | None:
    """Joins the processes of a group, by default all that MLX started; None where this one is
    alone. Raises ResourceError where they cannot reach each other."""
    global _current
    if _current is None:
        group = starting.connect() if group is None else group
        if group.size() > 1:
            _current = _lead(group) if group.rank() == 0 else _follow(group)
            starting.joined()
            atexit.register(leave)
    return _current


def leave() -> None:
    """Rank 0's work is done, as it is when its process ends; the others end."""
    global _current
    if isinstance(_current, Leader):
        _current.end()
    _current = None


def _lead(group: mx.distributed.Group) -> Leader:
    addresses = _addresses()
    secret = secrets.token_hex(16)
    near = all(address.startswith("127.") for address in addresses)
    with socket.create_server(("127.0.0.1" if near else "", 0), backlog=64) as door:
        port = door.getsockname()[1]
        _introduce(group, {"addresses": addresses, "port": port, "secret": secret})
        return Leader(group, *_admit(door, group.size(), secret))


def _admit(
    door: socket.socket, size: int, secret: str
) -> tuple[dict[int, Channel], dict[int, str], dict[int, int]]:
    """Channels and names of the machines by rank, and the processes on this machine."""
    channels: dict[int, Channel] = {}
    names: dict[int, str] = {}
    processes: dict[int, int] = {}
    greeted: queue.SimpleQueue[tuple[Channel, Message, str]] = queue.SimpleQueue()
    deadline = time.monotonic() + _CONNECTING
    door.settimeout(0.1)
    while len(channels) < size - 1:
        if time.monotonic() > deadline:
            missing = min(set(range(1, size)) - set(channels))
            raise ResourceError(
                f"Rank {missing} does not reach rank 0 beside MLX's connection: allow "
                "connections between the machines, in macOS's firewall too."
            )
        with suppress(TimeoutError):
            opened = door.accept()[0]
            # A connection that sends nothing delays no other.
            threading.Thread(
                target=_greet, args=(opened, secret, size, greeted), daemon=True
            ).start()
        while not greeted.empty():
            channel, hello, address = greeted.get()
            rank = hello.fields["rank"]
            if rank in channels:
                channel.close()
                continue
            channels[rank], names[rank] = channel, str(hello.fields["name"])[:80]
            if hello.fields["name"] == machine_name() and address == "127.0.0.1":
                processes[rank] = int(hello.fields["process"])
    return channels, names, processes


def _greet(
    opened: socket.socket,
    secret: str,
    size: int,
    greeted: queue.SimpleQueue[tuple[Channel, Message, str]],
) -> None:
    """Hands on a connection that begins as one of ours does, and closes any other."""
    with suppress(OSError):
        address, channel = opened.getpeername()[0], Channel(opened)
        with suppress(LostError):
            hello = channel.receive(3.0, unverified=True)
            if _is_ours(hello, secret, size):
                greeted.put((channel, hello, address))
                return
        channel.close()


def _is_ours(hello: Message, secret: str, size: int) -> bool:
    given, rank = hello.fields.get("secret"), hello.fields.get("rank")
    known = isinstance(given, str) and hmac.compare_digest(given.encode(), secret.encode())
    return known and isinstance(rank, int) and 0 < rank < size


def _follow(group: mx.distributed.Group) -> Follower:
    told = _introduce(group, None)
    hello = {
        "secret": told["secret"],
        "rank": group.rank(),
        "name": machine_name(),
        "process": os.getpid(),
    }
    for address in told["addresses"]:
        try:
            channel = Channel(socket.create_connection((address, told["port"]), timeout=3.0))
            channel.send("hello", **hello)
        except (OSError, LostError):
            continue
        return Follower(group, channel)
    raise ResourceError(
        f"Rank {group.rank()} does not reach rank 0 at {', '.join(told['addresses'])}: allow "
        "connections between the machines, in macOS's firewall too."
    )


def _introduce(group: mx.distributed.Group, card: Mapping[str, Any] | None) -> dict[str, Any]:
    """Rank 0's card, on every rank."""
    text = b"" if card is None else json.dumps(card).encode()
    own = mx.array(list(text.ljust(_ROOM)) if card is not None else [0] * _ROOM, dtype=mx.int32)
    found = mx.distributed.all_sum(own, group=group)
    who = f"Rank {group.rank()}"
    try:
        with starting.watched(
            f"{who} has waited {_MEETING} seconds for the others: start all again.", _MEETING
        ):
            mx.eval(found)
    except RuntimeError as error:
        starting.wait_for_verdict()
        raise ResourceError(
            "One of the processes ended before all had met: see what its machine says, and start "
            "all again."
        ) from error
    try:
        told = json.loads(bytes(found.tolist()))  # type: ignore[arg-type]
        return {name: told[name] for name in ("addresses", "port", "secret")}
    except (ValueError, TypeError, KeyError):
        raise ResourceError(
            f"{who} was sent what no rank sends: see that nothing else connects to the ports of "
            "the host file, and that all ranks have the same host file and mlx_dgemma."
        ) from None


def _addresses() -> list[str]:
    """Where the others may reach this machine, MLX's own connections first: they end together."""
    found = starting.addresses()
    if found and all(address.startswith("127.") for address in found):
        return list(dict.fromkeys(found))
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing; the route says which address is used
        found.append(str(probe.getsockname()[0]))
    return list(dict.fromkeys(address for address in found if not address.startswith("127.")))[:32]
