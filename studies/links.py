"""The same ids over a slow, uneven, lossy or stalling link; and the end where it stalls for good.

    sudo python -m studies.links

Each of two processes runs in a network namespace of its own, with one TUN device. A third process
carries the packets between the devices and holds them up, drops them or stops for a while, in
their order: what tc's netem does, without that kernel module. Needs Linux, root, iproute2.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import json
import multiprocessing
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TASKS = ("text", "long", "presets", "turns")
LIMIT = 15.0
_NEW_NETWORK, _SET_INTERFACE, _TUN = 0x40000000, 0x400454CA, 0x1001


@dataclass(frozen=True)
class Link:
    """delay, jitter: seconds each way. loss: of packets. stall: seconds without any packet, five
    seconds after the model was loaded; None is none, infinity to the end."""

    name: str
    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    stall: float | None = None


LINKS = (
    Link("as it is"),
    Link("2 ms", delay=2e-3),
    Link("1 to 5 ms", delay=3e-3, jitter=2e-3),
    Link("1 ms, 1 % lost", delay=1e-3, loss=0.01),
    Link("1 ms, silent for 5 s", delay=1e-3, stall=5.0),
    Link("silent for good", stall=float("inf")),
)


def enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


def make_ends() -> tuple[list[int], list[int]]:
    """Two namespaces, and the TUN device of each, 10.77.0.1 and 10.77.0.2."""
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    namespaces, devices = [], []
    for number in (1, 2):
        if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "unshare")
        namespaces.append(os.open("/proc/self/ns/net", os.O_RDONLY))
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _SET_INTERFACE, struct.pack("16sH", b"wire", _TUN))
        for command in (
            "link set lo up",
            f"addr add 10.77.0.{number}/24 dev wire",
            "link set dev wire mtu 9000 txqueuelen 10000 up",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        devices.append(device)
    enter(here)
    return namespaces, devices


def carry(devices: list[int], link: Link, silent: Any) -> None:
    """Carries packets until this process is ended. silent: set when the stall begins."""
    generator = random.Random(1)
    waiting: list[tuple[float, int, int, bytes]] = []
    last = [0.0, 0.0]  # when the packet before is due: order is kept
    count, until = 0, 0.0
    while True:
        now = time.monotonic()
        if link.stall is not None and silent.is_set() and not until:
            until = now + link.stall
        held = now < until
        due = max(waiting[0][0] - now, 0) if waiting and not held else 0.05
        ready, _, _ = select.select(devices, [], [], min(due, 0.05))
        for device in ready:
            end = devices.index(device)
            packet = os.read(device, 1 << 16)
            if held or generator.random() < link.loss:
                continue
            delay = link.delay + generator.uniform(-link.jitter, link.jitter)
            last[end] = max(time.monotonic() + delay, last[end])
            heapq.heappush(waiting, (last[end], count, 1 - end, packet))
            count += 1
        while waiting and not held and waiting[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(waiting)
            try:
                os.write(devices[end], packet)
            except OSError:  # a full queue, as in a switch
                continue


def start(command: list[str], namespaces: list[int], folder: Path) -> list[subprocess.Popen[str]]:
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([["10.77.0.1:32323"], ["10.77.0.2:32323"]]))
    return [
        subprocess.Popen(
            command,
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda namespace=namespace: enter(namespace),
        )
        for rank, namespace in enumerate(namespaces)
    ]


def run(link: Link, namespaces: list[int], devices: list[int]) -> str:
    """What came of one link, in words."""
    from tests.distributed.processes import finish, said

    silent = multiprocessing.Event()
    carrier = multiprocessing.Process(target=carry, args=(devices, link, silent), daemon=True)
    carrier.start()
    tests = ROOT / "tests" / "distributed"
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if link.stall == float("inf"):
                program = [sys.executable, str(tests / "working.py"), "denoising"]
                processes = start(program, namespaces, folder)
                assert processes[0].stdout is not None
                for _ in range(4):
                    processes[0].stdout.readline()
                silent.set()
                started = time.monotonic()
                (_, errors), _ = finish(processes, timeout=60)
                took = time.monotonic() - started
                verdict = "in time" if took < LIMIT else "TOO LATE"
                return f"all ended after {took:.1f} s, {verdict}: {' '.join(said(errors))}"
            out, started = folder / "out.json", time.monotonic()
            program = [sys.executable, str(tests / "tasks.py"), str(out), str(folder), *TASKS]
            processes = start(program, namespaces, folder)
            if link.stall is not None:
                time.sleep(5)
                silent.set()
            spoken = finish(processes, timeout=500)
            if not out.exists():
                return f"NO ANSWER: {spoken}"
            same = json.loads(out.read_text()) == alone()
            return f"{'the same ids' if same else 'OTHER IDS'}, {time.monotonic() - started:.0f} s"
    finally:
        carrier.terminate()
        carrier.join()


def alone() -> Any:
    """What one process answers."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out.json"
        program = str(ROOT / "tests" / "distributed" / "tasks.py")
        subprocess.run([sys.executable, program, str(out), name, *TASKS], check=True)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="links whose name has this")
    only = parser.parse_args().only or ""
    namespaces, devices = make_ends()
    for link in LINKS:
        if only in link.name:
            print(f"{link.name}: {run(link, namespaces, devices)}", flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    main()
