"""Addresses that are not the public internet's: as literals, as DNS answers and after a redirect.

The ranges are those of IANA's special-purpose registries and the forms in which an IPv6 address
carries an IPv4 one; the addresses inside them are drawn.
"""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt import download
from mlx_dgemma.prompt.download import fetch, public_address
from mlx_dgemma.prompt.pictures import open_picture
from mlx_dgemma.server.settings import SERVER_ACCESS

NOT_PUBLIC = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
    *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/128", "::1/128", "::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48"),
    *("100::/64", "2001::/32", "2001:2::/48", "2001:10::/28", "2001:db8::/32", "2002::/16"),
    *("3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
    *("::ffff:10.0.0.0/104", "::ffff:127.0.0.0/104", "::ffff:169.254.0.0/112"),
    *("::ffff:192.168.0.0/112", "::ffff:0.0.0.0/104"),
)
PUBLIC = ("93.184.216.34", "8.8.8.8", "192.0.1.1", "2606:4700::1111", "2a00:1450::1")
ODD_LITERALS = (  # other spellings of 127.0.0.1 and 0.0.0.0 that some resolvers take
    *("2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "127.0.0.1.", "[::ffff:7f00:1]"),
    *("[::1%25lo]", "localhost", "LOCALHOST"),
)


def inside(network: str) -> Iterator[str]:
    """The first and the last address of a network, and some between."""
    whole = ipaddress.ip_network(network)
    rng = random.Random(network)
    for offset in (
        0,
        whole.num_addresses - 1,
        *(rng.randrange(whole.num_addresses) for _ in "123"),
    ):
        yield str(whole[offset])


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every connection that is tried; none is made."""
    tried: list[Any] = []

    def connect(address: Any, *_: Any, **__: Any) -> socket.socket:
        tried.append(address)
        raise ConnectionRefusedError("no connection is made in a test")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connect(address))
    return tried


def _answering(address: str) -> Callable[..., Any]:
    return lambda host, port, **_: [(0, 0, 0, "", (address, port))]


@pytest.mark.parametrize("network", NOT_PUBLIC)
def test_no_way_leads_into_a_range(
    network: str, connections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in inside(network):
        literal = f"[{address}]" if ":" in address else address
        with pytest.raises(InputError, match="not a public address"):
            open_picture(f"http://{literal}/a.png", SERVER_ACCESS)
        with pytest.raises(InputError, match="not a public address"):
            public_address("pictures.example", 80, _answering(address))
        _check_redirect(f"http://{literal}/a.png", monkeypatch)
    assert connections == []


def _check_redirect(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A public host that sends us on to the address: the second connection is not made."""
    asked: list[str] = []

    class Visit:
        def __init__(self, parts: Any, *_: Any) -> None:
            asked.append(parts.hostname)

        def get(self) -> tuple[int, str]:
            return 302, target

    def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34"] if host == "public.example" else public_address(host, port)

    with monkeypatch.context() as patched:
        patched.setattr(download, "_Visit", Visit)
        with pytest.raises(InputError, match="not a public address"):
            fetch("http://public.example/a.png", resolve)
    assert asked == ["public.example"]


@pytest.mark.parametrize("host", ODD_LITERALS)
def test_other_spellings_of_this_machine_lead_nowhere(host: str, connections: list[Any]) -> None:
    with pytest.raises(InputError):
        open_picture(f"http://{host}/a.png", SERVER_ACCESS)
    assert connections == []


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_connected_to(address: str, connections: list[Any]) -> None:
    literal = f"[{address}]" if ":" in address else address
    with pytest.raises(InputError, match="cannot be read"):
        open_picture(f"http://{literal}/a.png", SERVER_ACCESS)
    assert [tried[0] for tried in connections] == [address]
