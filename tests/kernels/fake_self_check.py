"""Stands in for the self-check process: `fake_self_check.py KIND...` checks operations broken in
these ways, one kind for each request; one kind alone is that of every request.
"""

import os
import signal
import sys
import time
from functools import partial

import mlx.core as mx

from mlx_dgemma.kernels import probe, registry

calls = 0


def kernel(x: mx.array, kind: str) -> list[mx.array]:
    global calls
    calls += 1
    if kind == "does not compile":
        raise RuntimeError("[metal::Device] Unable to build metal library from source")
    if kind == "compiler is interrupted":
        raise RuntimeError(
            "[metal::Device] Unable to load kernel: XPC_ERROR_CONNECTION_INTERRUPTED"
        )
    if kind == "aborts the compiler":
        print(
            "libc++abi: [metal::Device] Unable to build metal library", file=sys.stderr, flush=True
        )
        os.abort()
    if kind == "out of memory":
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
    if kind == "hangs":
        time.sleep(60)
    if kind == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "wrong":
        x = x * 1.5
    if kind == "wrong integer":
        return [x, mx.array([2])]
    if kind == "NaN":
        x = x / 0
    if kind == "racy":
        x = x + 1e-6 * calls
    if kind == "slow":
        time.sleep(0.05)  # far from the twin on a busy machine as well
    return [x, mx.array([1])]


def twin(x: mx.array) -> list[mx.array]:
    time.sleep(0.003)
    return [x, mx.array([1])]


def probes(shape: registry.Shape):
    kind = shape["kind"]
    values = mx.arange(4.0)
    yield registry.Probe(partial(kernel, values, kind), partial(twin, values), tolerance=1e-3)


FAKE = registry.Operation("fake", ("size", "kind"), (), lambda shape: True, probes)

if __name__ == "__main__":
    requests = sys.stdin.read()
    if "never begins" in requests:
        time.sleep(60)
    elif "garbage" in requests:
        print("warming up")
    elif "fails" in requests:
        sys.exit("no such module")
    elif "silent" not in requests:
        print("a library's chatter")
        print("[1, 2]")
        probe.answer(requests, {"fake": FAKE}, probe._write)
