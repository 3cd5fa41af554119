"""A rank of a group that works until something ends it: `python working.py PHASE [WHAT]`.

PHASE: idle, prefill or denoising. Rank 0 writes a line "joined" when MLX has connected all, "ready"
when the model is loaded, and one for every round.
WHAT: how this rank differs: version, memory, a checkpoint or kernels of its own.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

import mlx_dgemma

if __name__ == "__main__":
    try:
        GROUP = mlx_dgemma.connect()  # before all that takes time
    except mlx_dgemma.DGemmaError as error:  # as the commands print it
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("joined", flush=True)

import mlx.core as mx
import numpy as np

from mlx_dgemma import load
from mlx_dgemma.checkpoint import agreement, plan
from mlx_dgemma.errors import DGemmaError


def differ(what):
    if what == "version":
        agreement.__version__ = "0.0.1"
    elif what == "memory":
        here = replace(plan.machine(), memory=4 << 20)
        plan.machine = lambda: here
    elif what == "trouble":
        from mlx_dgemma.model.following import Following

        def trouble(self, **_):
            raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

        Following._decode = trouble


def main(phase, what=""):
    differ(what)
    checkpoint = "/proc/self/cwd/model" if what == "checkpoint" else None
    try:
        model, _ = load(checkpoint, group=GROUP)
    except DGemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("ready", flush=True)
    while phase == "idle":
        time.sleep(1)
    cache = model.make_cache()
    prompt = np.arange(5, 45)
    model.prefill(prompt, cache)
    snapshot = cache.snapshot()
    canvas = mx.array(np.arange(32)[None] * 7 % 800)
    for _ in range(int(os.environ.get("ROUNDS", 10**9))):
        if phase == "prefill":
            cache.restore(snapshot)
            model.prefill(prompt, cache)
            mx.eval(cache.arrays)
        else:
            mx.eval(model.hidden(canvas, cache))
        print("round", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
