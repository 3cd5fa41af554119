"""Host time that several processes add to a denoising step, measured on a CPU's loopback.

    python -m studies.host_time

The demo model in one process, and in two of which rank 0 is watched: the CPU time of the thread
that builds a step's graph and hands it over, from the canvas to the next signal. Per layer
this is what a Mac's processor does too; the published model has thirty layers.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 60
PUBLISHED_LAYERS = 30


def measure(out: str) -> None:
    import mlx.core as mx
    import numpy as np

    from mlx_dgemma import load
    from mlx_dgemma.decoding.canvas import CanvasRequest
    from mlx_dgemma.decoding.canvas_state import CanvasState
    from mlx_dgemma.decoding.denoise import advance, step
    from mlx_dgemma.decoding.draws import Place, SeededDraws
    from mlx_dgemma.decoding.settings import DecodingSettings

    model, _ = load(group=mx.distributed.init() if "MLX_RANK" in os.environ else None)
    cache = model.make_cache()
    model.prefill(np.arange(5, 25), cache)
    settings = DecodingSettings.from_defaults(model.config.generation, {})
    samples, passes = [], []
    canvas = mx.zeros((1, 32), mx.int32)
    for _ in range(STEPS):
        started = time.thread_time()
        hidden = model.hidden(canvas, cache)
        mx.async_eval(hidden)
        passes.append(time.thread_time() - started)
        mx.eval(hidden)
    for seed in range(STEPS):
        request = CanvasRequest(SeededDraws(seed))
        state = CanvasState.initial([request], Place(0, 0, 0), 32, 800, 48)
        mx.eval(state.canvas, cache.arrays)
        started = time.thread_time()
        outcome = step(model, cache, settings, state)
        mx.async_eval(outcome.report.packed)
        built = time.thread_time() - started
        numbers = outcome.report.read()
        started = time.thread_time()
        advance(model, state, outcome, numbers)
        mx.async_eval(state.signal)
        samples.append(built + time.thread_time() - started)
        mx.eval(state.signal)
    layers = model.config.text.num_hidden_layers
    Path(out).write_text(
        json.dumps([statistics.median(samples), min(samples), min(passes), layers])
    )


def main() -> None:
    from tests.distributed.processes import finish, start

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, __file__]
        found = {}
        for size in (1, 2):
            out = str(folder / f"{size}.json")
            if size == 1:
                subprocess.run([*command, out], check=True)
            else:
                finish(start([*command, out], 2, folder))
            found[size] = json.loads(Path(out).read_text())
    layers = found[1][3]
    for size, (median, least, through, _) in found.items():
        print(
            f"{size} processes: median {1e3 * median:.2f} ms, least {1e3 * least:.2f} ms a step; "
            f"of it the pass through the layers {1e3 * through:.2f} ms"
        )
    added, of_layers = found[2][1] - found[1][1], found[2][2] - found[1][2]
    whole = added - of_layers + of_layers * PUBLISHED_LAYERS / layers
    print(
        f"added: {1e3 * added:.2f} ms a step of {layers} layers, and in proportion "
        f"{1e3 * whole:.2f} ms a step of {PUBLISHED_LAYERS}"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        main()
