"""Would committing a draft inside the step that confirms it be worth it?

    python studies/speculative.py --n 20

A block stops when its draft equals the one before, so the commit of the draft before could ride in
the same pass as the step that confirms it: 512 rows, the weights read once. If the draft moves, the
commit was for nothing. It would be tried whenever the mean entropy of the step before is low; how
often that is right is counted on the demo's replies, and what it saves is predicted by the
roofline model for the published 4-bit shapes: nothing of it is measured on Apple hardware.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_dgemma import Draft, load, stream_generate
from mlx_dgemma.benchmark.chips import CHIPS, Chip
from mlx_dgemma.benchmark.costs import Cost, floor_seconds, prefill_costs, step_costs, stored_bytes
from mlx_dgemma.benchmark.synthetic import synthetic_config
from mlx_dgemma.demo.tasks import TASKS, held_out
from mlx_dgemma.model.config import ModelConfig

THRESHOLDS = (0.005, 0.02, 0.05)
CONTEXT = 1024


def trajectories(n: int) -> list[list[tuple[float, bool]]]:
    """Every block's steps as (mean entropy, whether the draft repeats the one before)."""
    model, tokenizer = load()
    blocks: list[list[tuple[float, bool]]] = []
    for task in TASKS:
        for seed, example in enumerate(held_out(task, n, seed=11)):
            before = None
            for event in stream_generate(
                model,
                tokenizer,
                example.messages,
                tools=example.tools,
                enable_thinking=example.enable_thinking,
                drafts=True,
                seed=seed,
                max_tokens=200,
            ):
                if not isinstance(event, Draft):
                    continue
                if event.step == 1:
                    blocks.append([])
                    before = None
                repeats = before is not None and np.array_equal(before, event.ids)
                blocks[-1].append((float(event.entropy.mean()), repeats))
                before = event.ids
    return blocks


def attempts(blocks: list[list[tuple[float, bool]]], threshold: float) -> tuple[float, float]:
    """Per block: commits tried in vain, and blocks whose last one was right."""
    vain = right = 0
    for block in blocks:
        for step in range(1, len(block)):
            if block[step - 1][0] < threshold:
                last = step == len(block) - 1
                right += last and block[step][1]
                vain += not (last and block[step][1])
    return vain / len(blocks), right / len(blocks)


def seconds(config: ModelConfig, chip: Chip) -> tuple[float, float]:
    """(saved by a commit inside a step, spent on one in vain), as floors."""
    step, commit = (
        step_costs(config, CONTEXT, conditioning="sparse"),
        prefill_costs(config, 256, CONTEXT),
    )
    stored = stored_bytes(config)
    both = {
        name: cost
        + commit.get(name, Cost())
        + Cost(0.0, -stored.get(name, 0) if name in commit else 0)
        for name, cost in step.items()
    }
    alone, apart, together = (floor_seconds(costs, chip) for costs in (step, commit, both))
    return alone + apart - together, together - alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10, help="replies per task")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    arguments = parser.parse_args()
    blocks = trajectories(arguments.n)
    mean = sum(map(len, blocks)) / len(blocks)
    config = ModelConfig.from_dict(synthetic_config("26b-4bit"))
    console, table = Console(), Table("tried below", "right per block", "in vain per block")
    names = ("Apple M1 Max", "Apple M3 Pro", "Apple M4 Max", "Apple M5 Max")
    for name in names:
        table.add_column(f"{name.removeprefix('Apple ')}, of a block")
    found = {}
    for threshold in THRESHOLDS:
        vain, right = attempts(blocks, threshold)
        gains = []
        for name in names:
            saved, spent = seconds(config, CHIPS[name])
            step = floor_seconds(step_costs(config, CONTEXT, conditioning="sparse"), CHIPS[name])
            gains.append((right * saved - vain * spent) / (mean * step))
        found[str(threshold)] = {
            "right": right,
            "vain": vain,
            **dict(zip(names, gains, strict=True)),
        }
        table.add_row(
            f"{threshold} nats", f"{right:.2f}", f"{vain:.2f}", *(f"{gain:+.1%}" for gain in gains)
        )
    console.print(f"{len(blocks)} blocks of {mean:.1f} steps; gains are predicted floors")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
