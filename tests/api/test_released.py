"""A runtime that is no longer held gives its memory back, in a process of its own."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import gc, json, sys, time
import mlx.core as mx
from mlx_dgemma import Noul, Runtime, infill

def active():
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()

QUICK = dict(seed=1, max_denoising_steps=2, max_tokens=8)
before, held, after = active(), [], []
for _ in range(2):
    runtime = Runtime()
    runtime.generate("Reverse: abc", **QUICK)
    stream = runtime.stream("Count from 10 to 40", **QUICK)
    next(stream)
    del stream  # left in the middle
    runtime.decide("a cat", {"cat": Noul("Is it a cat?")}, orders=1)
    holes = ("a <hole:1> b",)
    runtime.call(lambda: infill(runtime.model, runtime.tokenizer, *holes, seed=1,
                                max_denoising_steps=2))
    held.append(active())
    if sys.argv[1] == "closed":
        runtime.close()
    del runtime
    end = time.monotonic() + 60
    while active() - before > 100_000 and time.monotonic() < end:
        time.sleep(0.05)  # the model's thread ends what it was at
    after.append(active())
print(json.dumps({"before": before, "held": held, "after": after}))
"""


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_memory_returns_with_the_runtime(how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    weights = 4_000_000  # of the demo's 2.4 million parameters, whatever they are computed in
    assert all(held - found["before"] > weights for held in found["held"])
    assert all(after - found["before"] < 100_000 for after in found["after"])
