"""Pictures from URLs: limits, redirects, and addresses that are nobody's business."""

from __future__ import annotations

import http.server
import socket
import threading
import time

import pytest

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt import download
from mlx_dgemma.prompt.download import any_address, fetch, is_public, public_address


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        kind, _, rest = self.path.lstrip("/").partition("?")[0].partition("/")
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", rest or "/redirect/")
            self.end_headers()
        elif kind == "missing":
            self.send_error(404)
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(600):  # half a minute
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif kind == "short":
            self.send_response(200)
            self.send_header("Content-Length", "50")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * int(rest or 10))

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen = []
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.url = f"http://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()


def answers(*addresses):
    """A name server that gives these addresses for every name."""
    return lambda host, port, **_: [(0, 0, 0, "", (address, port)) for address in addresses]


def refusal(*arguments, **options):
    with pytest.raises(InputError) as caught:
        fetch(*arguments, **options)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def test_what_a_url_holds(server):
    assert fetch(f"{server.url}/file/25") == b"x" * 25
    assert fetch(f"{server.url}/redirect//file/3") == b"xxx"


def test_the_connection_goes_to_the_address_that_was_checked(server):
    """The name is looked up once, so a second, other answer cannot matter."""
    asked = []

    def resolve(host, port):
        asked.append(host)
        return ["127.0.0.1"]

    url = f"http://pictures.example:{server.server_port}/file/4?a=b c&ü"
    assert fetch(url, resolve) == b"xxxx"
    assert asked == ["pictures.example"]
    host = f"pictures.example:{server.server_port}"
    assert server.seen[-1] == ("/file/4?a=b%20c&%C3%BC", host)


def test_every_redirect_is_checked(server):
    def resolve(host, port):
        return (
            public_address(host, port, answers("10.0.0.7")) if host == "inside" else ["127.0.0.1"]
        )

    assert "inside is not a public address" in refusal(
        f"{server.url}/redirect/http://inside/secret", resolve
    )
    assert "not from file:" in refusal(f"{server.url}/redirect/file:///etc/passwd", resolve)
    assert "redirects more than 5 times" in refusal(f"{server.url}/redirect/", resolve)


def test_limits_of_size_and_time(server):
    assert "larger than 1 MB" in refusal(f"{server.url}/file/2000000", max_bytes=1 << 20)
    started = time.monotonic()
    assert "did not answer within 0.5 seconds" in refusal(f"{server.url}/drip", seconds=0.5)
    assert time.monotonic() - started < 15  # though every byte came in time
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert "did not answer within 0.3 seconds" in refusal(url, seconds=0.3)


def test_answers_that_are_no_picture(server):
    assert "status 404" in refusal(f"{server.url}/missing")
    assert "ended early" in refusal(f"{server.url}/short")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "cannot be read" in refusal(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    "url",
    ["http://", "http://[::1", "http://host:99999/", "http://a b/", "https:///x", "http://\u2100/"],
)
def test_urls_that_are_none(url):
    assert refusal(url, lambda host, port: ["127.0.0.1"], seconds=2)


def test_a_host_that_is_not_there():
    def nowhere(*_, **__):
        raise socket.gaierror("unknown")

    with pytest.raises(InputError, match=r"The host nowhere\.example cannot be found"):
        any_address("nowhere.example", 80, nowhere)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1",
        "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2001:0:7f00:1::1", "198.18.0.1", "192.0.2.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)
    with pytest.raises(InputError, match="not a public address"):
        public_address("host", 80, answers("93.184.216.34", address))


def test_public_addresses():
    found = public_address("host", 443, answers("93.184.216.34", "2606:4700::1111"))
    assert found == ["93.184.216.34", "2606:4700::1111"]


def test_certificates_are_always_there():
    assert download._trusted().verify_mode.name == "CERT_REQUIRED"
