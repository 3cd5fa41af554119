"""What a setting costs and is worth: the demo checkpoint on held-out puzzles with a judge.

    python studies/quality.py                              # the presets
    python studies/quality.py --all --n 100 --json out.json
    python studies/quality.py --guards                     # terse prompts and empty replies

Each cell is the share of right answers in how many decoder passes per canvas.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mlx_dgemma import Finish, load, stream_generate
from mlx_dgemma.benchmark.quality import measure, overall
from mlx_dgemma.decoding.settings import PRESETS
from mlx_dgemma.demo.tasks import TASKS
from mlx_dgemma.machine.reports import report, write_report

SETTINGS: dict[str, dict[str, Any]] = {
    "reference": {},
    "24 steps": {"max_denoising_steps": 24},
    "16 steps": {"max_denoising_steps": 16},
    "8 steps": {"max_denoising_steps": 8},
    "stability 0": {"stability_threshold": 0},
    "confidence 0.05": {"confidence_threshold": 0.05},
    "confidence 0.05, stability 0": {"confidence_threshold": 0.05, "stability_threshold": 0},
    "bound 0.03": {"entropy_bound": 0.03},
    "bound 0.3": {"entropy_bound": 0.3},
    "bound 1.0": {"entropy_bound": 1.0},
    "0.4 -> 0.2": {"t_max": 0.4, "t_min": 0.2},
    "greedy": {"temp": 0.0},
    "confidence-threshold": {"sampler": "confidence-threshold", "temp": 0.0},
}
# Prompts shorter than anything the demo was trained on.
TERSE = ("hi", "ok", "?", "7", "yes", "go", "list", "sort", "a fruit", "sudoku", "name", "json")


def guards(model: Any, tokenizer: Any, n: int) -> dict[str, dict[str, float]]:
    """Share of empty replies to terse prompts, and decoder passes, by guard."""
    figures = {}
    for guard in ("allow", "reroll", "suppress"):
        empty, steps = [], []
        for prompt in TERSE:
            for seed in range(n):
                events = list(
                    stream_generate(
                        model,
                        tokenizer,
                        prompt,
                        seed=seed,
                        max_tokens=model.config.canvas_length,
                        empty_reply=guard,
                    )
                )
                finish = events[-1]
                assert isinstance(finish, Finish)
                empty.append(finish.generated_tokens == 0)
                steps.append(finish.steps_per_block[0])
        figures[guard] = {
            "empty": statistics.fmean(empty),
            "n": len(empty),
            "steps of the last attempt": statistics.fmean(steps),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=50, help="prompts per task")
    parser.add_argument("--task", action="append", choices=tuple(TASKS), help="default: all")
    parser.add_argument("--model", help="checkpoint folder (default: the bundled demo)")
    parser.add_argument("--all", action="store_true", help="single settings instead of presets")
    parser.add_argument("--guards", action="store_true", help="empty replies to terse prompts")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    console = Console()
    if arguments.guards:
        figures: dict[str, Any] = guards(model, tokenizer, max(1, arguments.n // len(TERSE)))
        for guard, values in figures.items():
            console.print(f"{guard:<10}{values['empty']:.2f} empty of {values['n']}")
    else:
        names = SETTINGS if arguments.all else {name: {"preset": name} for name in PRESETS}
        columns, figures = {}, {}
        with Progress(console=Console(stderr=True)) as progress:
            for name, settings in names.items():
                tasks = measure(
                    model,
                    tokenizer,
                    prompts=arguments.n,
                    tasks=arguments.task,
                    track=lambda tasks, name=name: progress.track(tasks, description=name),
                    **settings,
                )
                mean = overall(tasks)
                figures[name] = {"tasks": tasks, "overall": mean}
                cells = [f"{f['right']:.2f} in {f['steps']:.1f}" for f in tasks.values()]
                both = f"{mean['right']:.2f} ± {mean['error']:.2f} in {mean['steps']:.1f}"
                columns[name] = [*cells, both, f"{mean['tokens_per_forward']:.1f}"]
        table = Table("task", *columns)
        tasks_and_totals = [*(arguments.task or TASKS), "all", "tokens per forward"]
        for row in zip(tasks_and_totals, *columns.values(), strict=True):
            table.add_row(*row)
        console.print(table)
    if arguments.json:
        kind = "guards" if arguments.guards else "presets"
        name = "demo" if arguments.model is None else Path(arguments.model).name
        write_report(arguments.json, report(kind, model=name, settings=figures))


if __name__ == "__main__":
    main()
