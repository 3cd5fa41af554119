"""What steps over some positions of a canvas cost: measured on this CPU, predicted for Macs.

    python studies/presets.py --answers answers.jsonl          # first: what steps computed
    python studies/active_positions.py --answers answers.jsonl --time
    python studies/active_positions.py --answers answers.jsonl --predict

The measured side runs a synthetic network of middling size with the published canvas of 256, and
has its steps compute as many positions as the demo's did, scaled from the demo's canvas. The
predicted side takes the published shapes, the chips' stated bandwidth and arithmetic, and experts
that multiply in whole tiles. Nothing here ran on a Mac.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from presets import OPEN, Line, read
from rich.console import Console
from rich.table import Table

from mlx_dgemma.benchmark.chips import CHIPS
from mlx_dgemma.benchmark.costs import floor_seconds, prefill_costs, step_costs
from mlx_dgemma.benchmark.synthetic import synthetic_config
from mlx_dgemma.checkpoint.random_weights import synthetic_model
from mlx_dgemma.decoding.active_positions import ActivePositions, sizes
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.model.config import ModelConfig

CANVAS = 256
PRESETS = ("reference", "balanced", "turbo")
OURS, MLX = 8, 16  # rows of a tile of an expert's products
# Of the published model: steps a block takes, and of a block's positions those that are not under
# 0.1 nats, on average over its steps (public per-step logs). Fewer cannot be active.
STEPS, ACTIVE = 14, 0.6
SHOWN = ("M1 Max", "M2 Ultra", "M3 Max", "M4 Max", "M4 Pro", "M5", "M5 Max")


def demo_canvas() -> int:
    return int(json.loads((CHECKPOINT / "config.json").read_text())["canvas_length"])


def counts(lines: Sequence[Line]) -> tuple[Counter[int], int, int]:
    """Positions of 256 -> how many steps computed so many; tokens, scaled too; blocks."""
    scale, found = CANVAS // demo_canvas(), Counter[int]()
    for line in lines:
        found.update(scale * computed for computed in line.computed)
    tokens = scale * sum(line.tokens for line in lines)
    return found, tokens, sum(len(line.steps) for line in lines)


def step_seconds(name: str, repeats: int) -> dict[int, float]:
    """Positions -> processor seconds of a denoising step that computes so many, the least seen."""
    model = synthetic_model(synthetic_config(name))
    cache = model.make_cache()
    model.prefill(np.arange(256), cache)
    every = DecodingSettings(max_denoising_steps=48, confidence_threshold=0.0, check_share=0.0)
    found: dict[int, float] = {}
    for size in sizes(CANVAS):
        spread = np.linspace(0, CANVAS - 1, size).astype(int)

        def some(self: ActivePositions, spread: np.ndarray = spread) -> np.ndarray:
            chosen = np.zeros(self.pinned.shape, dtype=bool)
            chosen[:, spread] = True
            return chosen if self.accepted.any() else np.ones_like(chosen)

        settings = every if size == CANVAS else replace(every, positions="active")
        with mock.patch.object(ActivePositions, "chosen", some):
            block = denoise_block(model, cache, settings, [CanvasRequest(SeededDraws(0))])
            next(block), next(block)  # whole, and the first of its size
            for _ in range(repeats):
                started = time.process_time()
                step = next(block)
                spent = time.process_time() - started
                assert int(step.computed.sum()) == size
                found[size] = min(spent, found.get(size, spent))
            block.close()
    return found


def measured(lines: Sequence[Line], name: str, repeats: int) -> dict[str, Any]:
    seconds = step_seconds(name, repeats)
    found: dict[str, Any] = {"model": name, "step_ms": {n: s * 1e3 for n, s in seconds.items()}}
    for preset in PRESETS:
        steps, tokens, blocks = counts([line for line in lines if line.variant == preset])
        spent = sum(count * seconds[size] for size, count in steps.items())
        found[preset] = {
            "ms_per_token": spent / tokens * 1e3,
            "steps": steps.total() / blocks,
            "positions": sum(size * count for size, count in steps.items()) / steps.total(),
        }
    for preset in PRESETS:
        found[preset]["of_reference"] = (
            found[preset]["ms_per_token"] / found["reference"]["ms_per_token"]
        )
    return found


def block_seconds(config: ModelConfig, chip: str, steps: Sequence[int], tile: int) -> float:
    """The floor of a block whose steps compute so many positions, and of its commit."""
    total = floor_seconds(prefill_costs(config, CANVAS, 1024), CHIPS[chip])
    for number, size in enumerate(steps):
        kind = "none" if number == 0 else "sparse"
        costs = step_costs(config, 1024, positions=size, tile=tile, conditioning=kind)
        total += floor_seconds(costs, CHIPS[chip])
    return total


def typical(lines: Sequence[Line]) -> list[int]:
    """Positions by step of an average block, rounded up to a size; its steps are the average."""
    scale, ladder = CANVAS // demo_canvas(), sizes(CANVAS)
    length = round(np.mean([len(line.computed) / len(line.steps) for line in lines]))
    means = []
    for at in range(length):
        own = [scale * line.computed[at] for line in lines if len(line.computed) > at]
        means.append(float(np.mean(own)))
    return [next(size for size in ladder if size >= mean - 1e-9) for mean in means]


def plans(lines: Sequence[Line]) -> dict[str, list[int]]:
    """What a block of the published model would compute, by preset and by what is assumed."""
    some = next(size for size in sizes(CANVAS) if size >= ACTIVE * CANVAS)
    found = {"reference, 14 steps": [CANVAS] * STEPS}
    found["balanced, 13 steps, no tail"] = [CANVAS] * (STEPS - 1)
    found["turbo, 13 steps, 60 % active"] = [CANVAS] * 2 + [some] * (STEPS - 3)
    for preset in PRESETS:
        own = [line for line in lines if line.variant == preset]
        found[f"{preset}, as on the demo"] = typical(own)
    return found


def predicted(lines: Sequence[Line]) -> dict[str, Any]:
    raw = synthetic_config("26b-4bit")
    config = ModelConfig.from_dict(raw)
    found: dict[str, Any] = {"evidence": "predicted (model), not measured", "plans": plans(lines)}
    for tile in (OURS, MLX):
        found[f"tile {tile}"] = {
            name: {
                chip: CANVAS / block_seconds(config, f"Apple {chip}", steps, tile) for chip in SHOWN
            }
            for name, steps in found["plans"].items()
        }
    return found


def show_measured(found: dict[str, Any], console: Console) -> None:
    table = Table("positions", "ms of a step", title=f"{found['model']}, measured on this CPU")
    for size, spent in found["step_ms"].items():
        table.add_row(str(size), f"{spent:.0f}")
    console.print(table)
    table = Table("preset", "steps", "positions per step", "ms per token", "of the reference")
    for preset in PRESETS:
        one = found[preset]
        table.add_row(
            preset,
            f"{one['steps']:.2f}",
            f"{one['positions']:.0f}",
            f"{one['ms_per_token']:.2f}",
            f"{one['of_reference']:.2f}",
        )
    console.print(table)


def show_predicted(found: dict[str, Any], console: Console) -> None:
    for name, steps in found["plans"].items():
        console.print(f"{name}: {steps}")
    for tile in (OURS, MLX):
        title = f"tokens/s at the floor, experts in tiles of {tile} rows, {found['evidence']}"
        table = Table("block", *SHOWN, title=title)
        for name, speeds in found[f"tile {tile}"].items():
            table.add_row(name, *(f"{speed:.0f}" for speed in speeds.values()))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, required=True, help="of studies/presets.py")
    parser.add_argument("--time", action="store_true", help="measure steps on this CPU")
    parser.add_argument("--predict", action="store_true", help="tokens per second of Macs")
    parser.add_argument("--synthetic", default="medium", help="the network that is timed")
    parser.add_argument("--repeats", type=int, default=4, help="steps of each size")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    arguments = parser.parse_args()
    lines = [line for line in read(arguments.answers) if line.task in OPEN]
    console, found = Console(), {}
    if arguments.time:
        found["measured"] = measured(lines, arguments.synthetic, arguments.repeats)
        show_measured(found["measured"], console)
    if arguments.predict:
        found["predicted"] = predicted(lines)
        show_predicted(found["predicted"], console)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
