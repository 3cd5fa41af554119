"""Stands in for the self-check process: `fake_self_check.py KIND` checks an operation broken that
way.
"""

import json
import os
import signal
import sys
import time

import mlx.core as mx

from mlx_dgemma.kernels import probe, registry

KIND = sys.argv[1]
calls = 0


def kernel() -> list[mx.array]:
    global calls
    calls += 1
    if KIND == "does not compile":
        raise RuntimeError("[metal::Device] Unable to build metal library from source")
    if KIND == "hangs":
        time.sleep(60)
    if KIND == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    value = mx.arange(4.0)
    if KIND == "wrong":
        value = value * 1.5
    if KIND == "wrong integer":
        return [value, mx.array([2])]
    if KIND == "NaN":
        value = value / 0
    if KIND == "racy":
        value = value + 1e-6 * calls
    if KIND == "slow":
        time.sleep(0.02)
    return [value, mx.array([1])]


def twin() -> list[mx.array]:
    time.sleep(0.005)
    return [mx.arange(4.0), mx.array([1])]


def probes(shape: registry.Shape):
    yield registry.Probe(kernel, twin, tolerance=1e-3)


if KIND == "garbage":
    print("warming up")
elif KIND == "silent":
    sys.exit(0)
else:
    print("a library's chatter")
    print(json.dumps(probe.check(registry.Operation("fake", (), probes), {})))
