"""The full-size network on a GPU: milliseconds per step and peak memory, ours and mlx-vlm's.

    python studies/gpu_step.py
    python studies/gpu_step.py --synthetic medium    # a rehearsal, on any machine

Random 4-bit weights of the published shapes, a prompt of 1,024 tokens, mlx-vlm 0.7.10 with its
entropy-bound sampler, every step with dense self-conditioning. One run writes the checkpoint (about
14 GB, to a temporary folder) and takes both by turns, each in a process of its own, until
`--minutes` are over; a round that began is finished. Prints one JSON object: device, kernels, and
per runtime the median step and the peak.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.benchmark.synthetic import synthetic_config, write_checkpoint
from mlx_dgemma.benchmark.versus import compare
from mlx_dgemma.kernels.report import report
from mlx_dgemma.machine.hardware import machine

RESERVE = 1.3  # a round may take so much longer than the one before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--synthetic", default="26b-4bit", metavar="NAME")
    parser.add_argument("--prompt-tokens", type=int, default=1024, metavar="N")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="timed per run")
    parser.add_argument("--minutes", type=float, default=7.5)
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="mlx_dgemma-") as scratch:
        folder, longest = Path(scratch), 0.0
        write_checkpoint(folder, synthetic_config(arguments.synthetic))
        mx.clear_cache()
        while not rounds or time.monotonic() + RESERVE * longest < ends:
            started = time.monotonic()
            rounds.append(
                compare(
                    folder,
                    steps=arguments.steps + 2,
                    prompt_tokens=arguments.prompt_tokens,
                    rounds=1,
                )
            )
            longest = max(longest, time.monotonic() - started)
    print(json.dumps(summary(rounds), indent=1))


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, whose steps are medians themselves."""
    runtimes = {}
    for runtime in rounds[0]:
        own = [one[runtime] for one in rounds]
        steps = sorted(one["step_seconds"] * 1e3 for one in own)
        runtimes[runtime] = {
            "ms_per_step": steps[len(steps) // 2],
            "ms_per_step_of_each_round": steps,
            "peak_bytes": max(one["weights_bytes"] + one["bytes_above_weights"] for one in own),
            "bytes_above_weights": max(one["bytes_above_weights"] for one in own),
        }
    return {
        "machine": machine().record(),
        "device": str(mx.default_device()),
        "mlx": version("mlx"),
        "mlx_vlm": version("mlx-vlm"),
        "kernels": {one["name"]: one["status"] for one in report()["operations"]},
        "rounds": len(rounds),
        "runtimes": runtimes,
    }


if __name__ == "__main__":
    main()
