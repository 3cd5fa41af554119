"""The full-size network on a GPU: milliseconds per step and peak memory, ours and mlx-vlm's.

    python studies/gpu_step.py
    python studies/gpu_step.py --rehearse    # every line of it on two narrow layers, anywhere

Random 4-bit weights of the published shapes, a prompt of 1,024 tokens, mlx-vlm 0.7.10 with its
entropy-bound sampler, every step with dense self-conditioning. One run checks the kernels, as
`load` does, writes the checkpoint (about 14 GB, to a temporary folder) and takes both by turns,
each in a process of its own, until `--minutes` are over; a round that began is finished. Says on
the error output how far it is, and prints one JSON object: device, kernels, and per runtime the
median step and the peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.benchmark.synthetic import synthetic_config, with_layers, write_checkpoint
from mlx_dgemma.benchmark.versus import compare
from mlx_dgemma.cli.arguments import positive
from mlx_dgemma.cli.command import command
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.kernels.verdict_report import report
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.kernel_shapes import kernel_shapes

RESERVE = 1.3  # a round may take so much longer than the one before


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--synthetic", default="26b-4bit", metavar="NAME")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--prompt-tokens", type=positive, default=1024, metavar="N")
    parser.add_argument("--steps", type=positive, default=8, metavar="N", help="timed per run")
    parser.add_argument("--minutes", type=minutes, default=7.5)
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    ends = began + 60 * arguments.minutes
    raw = synthetic_config(arguments.synthetic)
    raw = rehearsal(raw) if arguments.rehearse else raw

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {what}", file=sys.stderr, flush=True)

    say("checking the kernels")
    dispatch.prepare(kernel_shapes(ModelConfig.from_dict(raw)))
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="mlx_dgemma-") as scratch:
        folder, longest = Path(scratch), 0.0
        say("writing the checkpoint")
        write_checkpoint(folder, raw)
        mx.clear_cache()
        while not rounds or time.monotonic() + RESERVE * longest < ends:
            started = time.monotonic()
            say(f"round {len(rounds) + 1}")
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
    return 0


def minutes(text: str) -> float:
    """0 to a day."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes from 0 to 1440")
    return value


def rehearsal(raw: dict[str, Any]) -> dict[str, Any]:
    """The same packing on two layers that are 64 wide, with a small canvas and vocabulary."""
    narrow = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 64),
        **{"num_experts": 16, "vocab_size": 4096, "num_attention_heads": 2, "head_dim": 32},
        **{"num_key_value_heads": 1, "num_global_key_value_heads": 1, "global_head_dim": 64},
    }
    ids = {name: 4000 for name in raw if name.endswith("_token_id") and name != "eos_token_id"}
    small = {**raw, **ids, "canvas_length": 32, "eos_token_id": [1]}
    return with_layers({**small, "text_config": {**raw["text_config"], **narrow}}, 2)


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
    sys.exit(main())
