"""What a process is started with, and foreign connections: no rank waits without end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import mlx.core as mx
import pytest

from mlx_dgemma.distributed import joining, vigil
from mlx_dgemma.distributed.channel import Channel
from mlx_dgemma.distributed.starting import connect, launched, world
from mlx_dgemma.errors import DGemmaError, ResourceError
from tests.distributed.processes import finish, free_ports, start

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
    with pytest.raises(DGemmaError) as refused:
        connect()
    assert sentence in str(refused.value)
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize("text", ["", "[]", '[["127.0.0.1:6001"]]'])
def test_one_process_is_alone(text, tmp_path, monkeypatch):
    (tmp_path / "hosts.json").write_text(text)
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    monkeypatch.setenv("MLX_RANK", "0")
    assert launched() is None
    assert connect().size() == world().size() == 1
    assert os.environ["MLX_HOSTFILE"]


def test_a_port_in_use_is_named(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "hosts.json").write_text(json.dumps([[place], ["127.0.0.1:6002"]]))
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
        monkeypatch.setenv("MLX_RANK", "0")
        with pytest.raises(ResourceError, match=f"cannot use {place}"):
            connect()


# What a process does before and after it waits for the others; no MLX, which takes a while.
ARRIVING = """
import sys, time
from mlx_dgemma.distributed import meeting, starting
meeting.LIMIT, meeting.SILENCE = 2.0, 2.0
starting.arrive()
print("here", flush=True)
if sys.argv[1] != "busy":
    starting._meeting.wait()
    print("went", flush=True)
    time.sleep(60 if sys.argv[1] == "inside MLX" else 0)
starting._meeting.joined() if sys.argv[1] == "joins" else time.sleep(60)
"""


def arrive(size, tmp_path, does):
    """Processes that do this, all here."""
    processes = start(
        [sys.executable, "-c", ARRIVING], size, tmp_path, arguments=[[one] for one in does]
    )
    for one in processes:
        assert one.stdout.readline() == "here\n", one.communicate()
    return processes


@pytest.mark.parametrize("does", ["busy", "waits"])
def test_a_rank_that_is_killed_before_all_wait_is_named(does, tmp_path):
    """What the others do then, imports or a wait, ends."""
    processes = arrive(3, tmp_path, [does, does, "busy"])
    processes[2].kill()
    (_, errors), *silent = finish(processes, timeout=20)
    assert ("error: " if does == "busy" else "ResourceError: ") + "Rank 2 ended before" in errors
    assert silent == [("", "")] * 2
    assert processes[1].returncode == (-signal.SIGKILL if does == "busy" else 2)


def test_what_the_process_tells_meanwhile_is_not_its_end(tmp_path):
    """MLX has connected rank 0 in the moment in which rank 1 is lost: it is said all the same."""
    with ExitStack() as opened:
        door = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        process = opened.enter_context(subprocess.Popen(["sleep", "60"]))
        answers, go = os.pipe()
        told = {
            **{"rank": 0, "size": 2, "process": process.pid, "go": go, "door": door.fileno()},
            **{"accepts": 1, "targets": {}, "hosts": "same", "json": False},
            **{"limit": 20.0, "silence": 20.0},
        }
        watch = opened.enter_context(
            subprocess.Popen(
                [sys.executable, "-I", "-S", vigil.__file__, json.dumps(told)],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[go, door.fileno()],
            )
        )
        link = opened.enter_context(socket.create_connection(door.getsockname()))
        watch.stdin.write(b"w")
        watch.stdin.flush()
        link.sendall(b"mlx_dgemma 1 1 same\nhere 1\nwaiting 1\n")
        assert os.read(answers, 10) == b"go\n"
        link.sendall(b"end 1 ended\n")
        time.sleep(0.05)
        watch.stdin.write(b"i")
        watch.stdin.flush()
        assert process.wait(timeout=20) == -signal.SIGKILL
        assert watch.stderr.readline().startswith(b"error: Rank 1 ended before all had met")
        os.close(go)
        os.close(answers)


def test_a_rank_that_is_stopped_or_never_connected_is_named(tmp_path):
    processes = arrive(2, tmp_path, ["waits", "waits"])
    processes[1].send_signal(signal.SIGSTOP)
    (out, errors), _ = finish(processes, timeout=20)
    if "went" not in out:  # it was stopped before
        assert "Rank 1 does not answer" in errors
    assert processes[1].returncode == -signal.SIGKILL
    processes = arrive(2, tmp_path, ["inside MLX", "inside MLX"])
    (_, errors), silent = finish(processes, timeout=20)
    assert errors.startswith("error: MLX has not connected rank 1 within 2 seconds: ")
    assert silent == ("went\n", "")
    assert [one.returncode for one in processes] == [-signal.SIGKILL] * 2


def test_ranks_that_join_are_left_alone(tmp_path):
    """In a ring; and where all call a coordinator, as jaccl has it."""
    found = finish(arrive(4, tmp_path, ["joins"] * 4), timeout=20)
    assert found == [("went\n", "")] * 4
    devices, port = tmp_path / "devices.json", free_ports(1)[0]
    devices.write_text(json.dumps([[None, "a", "b"], ["a", None, "c"], ["b", "c", None]]))
    told = {"MLX_IBV_DEVICES": str(devices), "MLX_JACCL_COORDINATOR": f"127.0.0.1:{port}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ARRIVING, "joins"],
            env={**told, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    assert finish(processes, timeout=20) == [("here\nwent\n", "")] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_joins_ends(rank, tmp_path):
    """Rank 0 says who did not come; another says that rank 0 did not. A program that is no rank
    answers in one's place: it is named too."""
    ports = free_ports(2)
    (tmp_path / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    with ExitStack() as opened:
        if rank == 0:
            other = opened.enter_context(socket.create_server(("127.0.0.1", ports[1])))
            threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400\n")).start()
        found = subprocess.run(
            [sys.executable, "-c", ARRIVING, "busy"],
            env={"MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": str(rank)},
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert found.stderr.startswith(
        ("error: Another program answers at rank 1's address", "error: Rank 0 has not come within")[
            rank
        ]
    )
    assert found.returncode == -signal.SIGKILL


def test_another_host_file_is_refused(tmp_path):
    """Such as one with the ranks in another order."""
    places = [[f"127.0.0.1:{port}"] for port in free_ports(3)]
    processes = []
    for rank, hosts in ((0, places), (1, [*places[:2], [f"127.0.0.1:{free_ports(1)[0]}"]])):
        path = tmp_path / f"{rank}.json"
        path.write_text(json.dumps(hosts))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", ARRIVING, "waits"],
                env={"MLX_HOSTFILE": str(path), "MLX_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (_, errors), (_, silent) = finish(processes, timeout=20)
    assert "Rank 1 was started with another host file or number: start all" in errors
    assert silent == ""


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
