"""What each preset is worth and costs: the demo checkpoint on held-out puzzles with a judge.

    python studies/presets.py --answers answers.jsonl          # 506 prompts each, minutes
    python studies/presets.py --answers answers.jsonl --table  # the table from what was measured
    python studies/presets.py --infill 150                     # texts with holes instead

One-answer tasks have one right reply, open-ended ones many. A run that is stopped goes on where it
was: every answer is a line of the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from infill import examples as texts
from infill import fill
from rich.console import Console
from rich.table import Table

from mlx_dgemma import load
from mlx_dgemma.benchmark.quality import MAX_TOKENS, SEED, ask
from mlx_dgemma.decoding.active_positions import ActivePositions
from mlx_dgemma.decoding.settings import PRESETS
from mlx_dgemma.demo.tasks import held_out

OPEN = ("grid", "list", "sentence", "json")
ONE = ("reverse", "sort", "count", "repeat", "sudoku", "tool", "think")
PER_TASK = {**dict.fromkeys(OPEN, 60), **dict.fromkeys(ONE, 38)}  # 506 prompts
VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {},
    "balanced": {"preset": "balanced"},
    "turbo": {"preset": "turbo"},
    "early commit alone": {"commit": "accepted"},
    "early commit, no gate": {"commit": "accepted", "commit_entropy": 100.0},
    "text alone": {"positions": "text"},
    "active alone": {"positions": "active"},
    "turbo, never checked": {"preset": "turbo", "check_share": 0.0},
    "turbo, always checked": {"preset": "turbo", "check_share": 1.0},
    "canvas of 24": {"canvas_length": 24},
    "turbo, canvas of 24": {"preset": "turbo", "canvas_length": 24},
    "canvas of 48": {"canvas_length": 48},
    "turbo, canvas of 48": {"preset": "turbo", "canvas_length": 48},
}


@dataclass(frozen=True)
class Line:
    """One answer on record."""

    variant: str
    task: str
    seed: int
    right: bool
    steps: list[int]
    computed: list[int]
    tokens: int
    fell_back: int
    text: str


def read(path: Path) -> list[Line]:
    if not path.exists():
        return []
    return [Line(**json.loads(line)) for line in path.read_text().splitlines()]


def run(path: Path, variants: Sequence[str], scale: float) -> None:
    """Asks what the file does not hold yet."""
    model, tokenizer = load()
    known = {(line.variant, line.task, line.seed) for line in read(path)}
    with path.open("a") as file:
        for variant in variants:
            for task, count in PER_TASK.items():
                for seed, example in enumerate(held_out(task, round(count * scale), seed=SEED)):
                    if (variant, task, seed) in known:
                        continue
                    options = {"seed": seed, "max_tokens": MAX_TOKENS, **VARIANTS[variant]}
                    answer = ask(model, tokenizer, example, **options)
                    line = Line(
                        variant,
                        task,
                        seed,
                        answer.right,
                        list(answer.steps),
                        list(answer.computed),
                        answer.tokens,
                        answer.fell_back,
                        answer.text,
                    )
                    file.write(json.dumps(line.__dict__) + "\n")
                file.flush()


def figures(lines: Sequence[Line], reference: dict[tuple[str, int], str]) -> dict[str, float]:
    """Of the answers of one variant to some tasks; agreement is with the reference's texts."""
    count, blocks = len(lines), sum(len(line.steps) for line in lines)
    right = sum(line.right for line in lines) / count
    tokens = sum(line.tokens for line in lines)
    return {
        "right": right,
        "error": (right * (1 - right) / count) ** 0.5,
        "forwards": sum(len(line.computed) for line in lines) / blocks,
        "positions_per_token": sum(sum(line.computed) for line in lines) / tokens,
        "same": sum(reference.get((line.task, line.seed)) == line.text for line in lines) / count,
        "fell_back": sum(line.fell_back for line in lines) / blocks,
        "n": count,
    }


def summary(lines: Sequence[Line]) -> dict[str, dict[str, dict[str, float]]]:
    """Variant -> task, and "one answer" and "open-ended" -> figures."""
    reference = {(line.task, line.seed): line.text for line in lines if line.variant == "reference"}
    groups = {"one answer": ONE, "open-ended": OPEN, **{task: (task,) for task in PER_TASK}}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for variant in VARIANTS:
        own = [line for line in lines if line.variant == variant]
        parts = {
            name: [line for line in own if line.task in tasks] for name, tasks in groups.items()
        }
        if own:
            found[variant] = {
                name: figures(part, reference) for name, part in parts.items() if part
            }
    return found


def show(found: dict[str, dict[str, dict[str, float]]], console: Console) -> None:
    for group in ("one answer", "open-ended"):
        table = Table(
            group, "right", "forwards", "positions per token", "same text", "fell back", "n"
        )
        for variant, parts in found.items():
            if group not in parts:
                continue
            one = parts[group]
            table.add_row(
                variant,
                f"{one['right']:.3f} ± {one['error']:.3f}",
                f"{one['forwards']:.2f}",
                f"{one['positions_per_token']:.2f}",
                f"{one['same']:.2f}",
                f"{one['fell_back']:.3f}",
                str(one["n"]),
            )
        console.print(table)


def infilled(count: int) -> dict[str, dict[str, float]]:
    """Preset -> share of right texts with one to three holes of known length, and computed canvas
    positions as a share of all: the known text is pinned."""
    model, tokenizer = load()
    found = {}
    for preset in PRESETS:
        right, computed, whole = [], 0, 0

        def watched(self: ActivePositions, chosen: Any = ActivePositions.chosen) -> np.ndarray:
            some: np.ndarray = chosen(self)
            nonlocal computed, whole
            computed, whole = computed + int(some.sum()), whole + some.size
            return some

        with mock.patch.object(ActivePositions, "chosen", watched):
            for seed, example in enumerate(texts("fixed", count, model, tokenizer)):
                result = fill(model, tokenizer, example, seed, preset=preset)
                right.append(example.verify(result.text))
        share = sum(right) / count
        found[preset] = {
            "right": share,
            "error": (share * (1 - share) / count) ** 0.5,
            "n": count,
            "computed": computed / whole if whole else 1.0,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, help="JSON lines, continued")
    parser.add_argument("--infill", type=int, metavar="N", help="fill so many texts by each preset")
    parser.add_argument("--variant", action="append", choices=tuple(VARIANTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the prompts per task")
    parser.add_argument("--table", action="store_true", help="measure nothing, show the table")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    arguments = parser.parse_args()
    if arguments.infill:
        for preset, one in infilled(arguments.infill).items():
            print(
                f"{preset:<10} {one['right']:.3f} ± {one['error']:.3f} right of {one['n']}, "
                f"{one['computed']:.2f} of the positions computed"
            )
        return
    if arguments.answers is None:
        parser.error("name a file with --answers")
    if not arguments.table:
        run(arguments.answers, arguments.variant or list(VARIANTS), arguments.scale)
    found = summary(read(arguments.answers))
    show(found, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
