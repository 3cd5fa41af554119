"""What a process is started with, and foreign connections: no rank waits without end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import mlx.core as mx
import pytest

from mlx_dgemma.distributed import joining
from mlx_dgemma.distributed.channel import Channel
from mlx_dgemma.distributed.starting import connected, launched
from mlx_dgemma.errors import DGemmaError, ResourceError
from tests.distributed.processes import free_ports

HOSTS = [["127.0.0.1:6001"], ["127.0.0.1:6002"]]
WRONG = {
    "no file": (None, "0", "cannot be read"),
    "no JSON": ("{", "0", "cannot be read"),
    "a number": ("7", "0", "is no list of the ranks' addresses"),
    "no port": ([["127.0.0.1"], ["127.0.0.1"]], "0", "is no list of the ranks' addresses"),
    "no address": ([[], []], "0", "is no list of the ranks' addresses"),
    "mlx.launch's": ([{"ssh": "a", "ips": ["127.0.0.1"]}], "0", "is a host file for mlx.launch"),
    "mlx.launch's, new": ({"backend": "ring", "hosts": []}, "0", "a host file for mlx.launch"),
    "no rank": (HOSTS, "x", "MLX_RANK='x' is no rank"),
    "below": (HOSTS, "-1", "MLX_RANK='-1' is no rank"),
    "above": (HOSTS, "2", "MLX_RANK=2 is no rank of a host file of 2"),
    "twice": ([HOSTS[0], HOSTS[0]], "0", "names 127.0.0.1:6001 twice"),
    "uneven": ([HOSTS[0], ["127.0.0.1:6002", "127.0.0.1:6003"]], "0", "give all ranks as many"),
    "unknown": ([HOSTS[0], ["no.invalid:6002"]], "0", "rank 1, no.invalid:6002, is unknown"),
    "elsewhere": ([["192.0.2.1:6001"], HOSTS[1]], "0", "is none of the machine"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_a_process_is_started_with(what, tmp_path, monkeypatch):
    hosts, rank, sentence = WRONG[what]
    path = tmp_path / "hosts.json"
    if hosts is not None:
        path.write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
    monkeypatch.setenv("MLX_HOSTFILE", str(path))
    monkeypatch.setenv("MLX_RANK", rank)
    assert launched()
    with pytest.raises(DGemmaError) as refused:
        connected()
    assert sentence in str(refused.value)
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize("text", ["", "[]", '[["127.0.0.1:6001"]]'])
def test_one_process_is_alone(text, tmp_path, monkeypatch):
    (tmp_path / "hosts.json").write_text(text)
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    monkeypatch.setenv("MLX_RANK", "0")
    assert not launched()


def test_a_port_in_use_is_named(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "hosts.json").write_text(json.dumps([[place], ["127.0.0.1:6002"]]))
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
        monkeypatch.setenv("MLX_RANK", "0")
        with pytest.raises(ResourceError, match=f"cannot use {place}"):
            connected()


def test_a_rank_that_nobody_joins_ends(tmp_path):
    """MLX waits for it with the interpreter held."""
    places = [[f"127.0.0.1:{port}"] for port in free_ports(2)]
    (tmp_path / "hosts.json").write_text(json.dumps(places))
    program = (
        "from mlx_dgemma.distributed import starting\nstarting.WAITING = 0.2\nstarting.connected()"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={"MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stderr.startswith("error: Rank 0 has waited 0.2 seconds for the others: start all")
    assert found.returncode != 0


def test_foreign_connections_delay_no_rank():
    with ExitStack() as opened:
        door = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        found = []
        leading = threading.Thread(target=lambda: found.append(joining._admit(door, 3, "secret")))
        leading.start()
        for words in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 12,
            bytes([2, 0, 0, 0, *[255] * 8]) + b"{}",  # and no end of bytes
        ):
            one = opened.enter_context(socket.create_connection(door.getsockname()))
            one.sendall(words)
        hello = {"secret": "secret", "name": "here", "process": 1}
        for rank, secret in (
            (1, "guess"),
            (0, "secret"),
            (1, "secret"),
            (1, "secret"),
            (2, "secret"),
        ):
            one = opened.enter_context(socket.create_connection(door.getsockname()))
            Channel(one).send("hello", **{**hello, "rank": rank, "secret": secret})
            time.sleep(0.01)
        leading.join(timeout=joining._CONNECTING + 5)
    channels, names, _ = found[0]
    assert sorted(channels) == [1, 2]
    assert names == {1: "here", 2: "here"}


def test_what_no_rank_sends_is_refused(monkeypatch):
    """Another program came to the port where MLX expected a rank."""
    alone = mx.distributed.init()
    for numbers in ([1000] * 3, [0] * 3, list(b"[1]"), list(b"{}  ")):
        monkeypatch.setattr(mx.distributed, "all_sum", lambda own, group, n=numbers: mx.array(n))
        with pytest.raises(ResourceError, match="was sent what no rank sends"):
            joining._introduce(alone, None)
