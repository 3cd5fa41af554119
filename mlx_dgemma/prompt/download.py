"""Fetches a picture from a URL within limits of size and time, from addresses that are allowed.

A host's name is resolved once per request, every answer is checked, and the connection goes to
a checked address: a name that answers differently the second time gains nothing. Redirects take
the same way. Proxies, cookies and credentials are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from mlx_dgemma.errors import InputError

MAX_BYTES = 64 << 20
MAX_SECONDS = 20.0
MAX_REDIRECTS = 5
# (host, port) -> the addresses that may be connected to; raises InputError when there are none.
Resolver = Callable[[str, int], list[str]]
_CHUNK = 1 << 16
_URL_SHOWN = 100


def any_address(host: str, port: int, lookup: Any = socket.getaddrinfo) -> list[str]:
    """Every address of a host; InputError when there is none."""
    try:
        answers = lookup(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(f"The host {host} cannot be found: check the URL.") from None
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def public_address(host: str, port: int, lookup: Any = socket.getaddrinfo) -> list[str]:
    """Every address of a host, all of them on the public internet; else InputError."""
    addresses = any_address(host, port, lookup)
    if not addresses or not all(is_public(address) for address in addresses):
        raise InputError(f"{host} is not a public address, so this server does not read from it.")
    return addresses


def is_public(address: str) -> bool:
    """Whether an address is reachable by anyone; tunnels to other addresses are not trusted."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if any(ip in network for network in _NOT_PUBLIC if network.version == ip.version):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


# Beyond what every supported Python's `is_global` knows: IANA's special-purpose registries, and
# the forms in which an IPv6 address carries an IPv4 one, to which a gateway may forward it.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # protocol assignments
            "192.88.99.0/24",  # relays of 6to4
            "::/96",  # IPv4-compatible
            "::ffff:0:0:0/96",  # IPv4-translated
            "64:ff9b::/96",  # NAT64
            "64:ff9b:1::/48",  # NAT64 of one's own network
            "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
            "2002::/16",  # 6to4
            "3fff::/20",  # documentation
            "5f00::/16",  # segment routing
            "fec0::/10",  # site-local
        ),
    )
)


def fetch(
    url: str,
    resolve: Resolver = any_address,
    *,
    max_bytes: int = MAX_BYTES,
    seconds: float = MAX_SECONDS,
) -> bytes:
    """What an http or https URL holds.

    Raises InputError for any other scheme, a refused or silent host, an answer other than 200,
    more than `max_bytes`, more than `seconds` in all, and more than MAX_REDIRECTS redirects.
    """
    shown = url if len(url) <= _URL_SHOWN else f"{url[:_URL_SHOWN]}..."
    deadline = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = resolve(parts.hostname or "", port)
        visit = _Visit(parts, port, addresses, deadline, max_bytes)
        try:
            status, found = visit.get()
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise InputError(f"{shown} did not answer within {seconds:g} seconds.") from error
            reason = " ".join(str(error).split()).rstrip(".") or "no answer"
            raise InputError(f"{shown} cannot be read: {reason}.") from error
        if isinstance(found, bytes):
            if len(found) > max_bytes:
                raise InputError(f"{shown} is larger than {max_bytes >> 20} MB.")
            return found
        if found is None:
            raise InputError(f"{shown} answers with status {status}, not with an image.")
        url = urljoin(url, found)
    raise InputError(f"{shown} redirects more than {MAX_REDIRECTS} times.")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        raise InputError(f"{url[:_URL_SHOWN]} is not a valid URL.") from None
    if parts.scheme not in ("http", "https"):
        raise InputError(f"Images come from http and https URLs alone, not from {parts.scheme}:.")
    if not parts.hostname or not port_is_valid:
        raise InputError(f"{url[:_URL_SHOWN]} is not a valid URL.")
    return parts


class _Visit:
    """One request to one host; a timer closes the connection when the time is up."""

    def __init__(
        self,
        parts: SplitResult,
        port: int,
        addresses: list[str],
        deadline: float,
        max_bytes: int,
    ):
        self._parts, self._port, self._addresses = parts, port, addresses
        self._deadline, self._max_bytes = deadline, max_bytes
        self._socket: socket.socket | None = None

    def get(self) -> tuple[int, bytes | str | None]:
        """(status, body), or (status, where to look instead), or (status, None)."""
        guard = threading.Timer(self._left(), self._hang_up)
        guard.daemon = True
        guard.start()
        connection = http.client.HTTPConnection(self._parts.hostname or "", self._port)
        connection.default_port = 443 if self._parts.scheme == "https" else 80
        try:
            connection.sock = self._connect()
            headers = {"User-Agent": "mlx_dgemma", "Accept": "image/*", "Connection": "close"}
            connection.request("GET", self._target(), headers=headers)
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return response.status, response.getheader("Location")
            if response.status != 200:
                return response.status, None
            return response.status, self._body(response)
        finally:
            guard.cancel()
            connection.close()

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left")
        return left

    def _hang_up(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it may be closed already
                self._socket.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> socket.socket:
        failure: OSError = OSError("the host has no address")
        for address in self._addresses:
            try:
                found = socket.create_connection((address, self._port), timeout=self._left())
            except OSError as error:
                failure = error
                continue
            self._socket = found
            if self._parts.scheme == "https":
                found = _trusted().wrap_socket(found, server_hostname=self._parts.hostname)
                self._socket = found
            return found
        raise failure

    def _target(self) -> str:
        path = quote(self._parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = quote(self._parts.query, safe="/%:@!$&'()*+,;=~?")
        return f"{path}?{query}" if query else path

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        """The body, or its first max_bytes + 1 bytes."""
        pieces, size = [], 0
        while size <= self._max_bytes:
            piece = response.read(min(_CHUNK, self._max_bytes + 1 - size))
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
        self._left()  # a connection that the timer closed looks like the end of the body
        if response.length:
            raise OSError("the connection ended early")
        return b"".join(pieces)


def _trusted() -> ssl.SSLContext:
    """The system's certificates; certifi's where Python was installed without any."""
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        with suppress(ImportError):
            import certifi  # comes with huggingface-hub

            context.load_verify_locations(certifi.where())
    return context
