"""What a setting costs and is worth: the demo checkpoint on held-out puzzles with a judge.

    python benchmarks/quality.py                              # the reference settings
    python benchmarks/quality.py --all --n 100 --json out.json
    python benchmarks/quality.py --guards                     # terse prompts and empty replies

Each cell is the share of right answers in how many decoder passes per canvas.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mlx_dgemma import Commit, Finish, load, stream_generate
from mlx_dgemma.demo.tasks import TASKS, Example, held_out

REFERENCE: dict[str, Any] = {}
SETTINGS: dict[str, dict[str, Any]] = {
    "reference": REFERENCE,
    "24 steps": {"max_denoising_steps": 24},
    "16 steps": {"max_denoising_steps": 16},
    "8 steps": {"max_denoising_steps": 8},
    "stability 0": {"stability_threshold": 0},
    "confidence 0.05": {"confidence_threshold": 0.05},
    "bound 0.03": {"entropy_bound": 0.03},
    "bound 1.0": {"entropy_bound": 1.0},
    "0.4 -> 0.2": {"t_max": 0.4, "t_min": 0.2},
    "greedy": {"temp": 0.0},
    "confidence-threshold": {"sampler": "confidence-threshold", "temp": 0.0},
}
# Prompts shorter than anything the demo was trained on.
TERSE = ("hi", "ok", "?", "7", "yes", "go", "list", "sort", "a fruit", "sudoku", "name", "json")


def ask(model: Any, tokenizer: Any, example: Example, **options: Any) -> tuple[bool, float]:
    """(right, decoder passes per canvas)."""
    events = list(
        stream_generate(
            model,
            tokenizer,
            example.messages,
            tools=example.tools,
            enable_thinking=example.enable_thinking,
            **options,
        )
    )
    commits = [event for event in events if isinstance(event, Commit)]
    finish = events[-1]
    assert isinstance(finish, Finish)
    text = "".join(commit.text for commit in commits)
    thought = "".join(commit.thinking for commit in commits)
    if any(commit.tool_calls for commit in commits):
        text = tokenizer.decode([token for commit in commits for token in commit.ids])
    right = example.verify(text, thought) if thought else example.verify(text)
    return right, statistics.fmean(finish.steps_per_block)


def measure(
    model: Any, tokenizer: Any, settings: dict[str, Any], n: int, progress: Progress
) -> Any:
    """task -> {"right": share, "error": its standard error, "steps": mean, "n": n}."""
    figures = {}
    for task in progress.track(list(TASKS), description="tasks"):
        pairs = [
            ask(model, tokenizer, example, seed=seed, max_tokens=200, **settings)
            for seed, example in enumerate(held_out(task, n, seed=2026))
        ]
        share = statistics.fmean(right for right, _ in pairs)
        figures[task] = {
            "right": share,
            "error": (share * (1 - share) / n) ** 0.5,
            "steps": statistics.fmean(steps for _, steps in pairs),
            "n": n,
        }
    return figures


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
    parser.add_argument("--model", help="checkpoint folder (default: the bundled demo)")
    parser.add_argument("--all", action="store_true", help="every setting, not the reference alone")
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
        names = SETTINGS if arguments.all else {"reference": REFERENCE}
        table = Table("setting", *TASKS)
        figures = {}
        with Progress(console=Console(stderr=True)) as progress:
            for name, settings in names.items():
                figures[name] = measure(model, tokenizer, settings, arguments.n, progress)
                cells = [f"{f['right']:.2f} in {f['steps']:.1f}" for f in figures[name].values()]
                table.add_row(name, *cells)
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
