"""Fixed questions with a judge: right answers, steps per block, tokens per forward."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mlx_dgemma.checkpoint.known_repositories import DEMO_NAME
from mlx_dgemma.cli.benchmark.tables import figures


def run(arguments: argparse.Namespace, messages: Console) -> dict[str, Any]:
    from mlx_dgemma.benchmark.against import side_by_side, summary
    from mlx_dgemma.benchmark.judged_questions import QUESTIONS
    from mlx_dgemma.benchmark.quality import known_tasks, measure, overall
    from mlx_dgemma.checkpoint.loading import load
    from mlx_dgemma.demo import CHECKPOINT
    from mlx_dgemma.evaluation.significance import compare

    known_tasks(arguments.task)
    model, tokenizer = load(
        arguments.model,
        revision=arguments.revision,
        adapter_path=arguments.adapter_path,
        dtype=arguments.dtype,
        chat_template=arguments.chat_template,
    )
    # The demo is asked what it was trained on, other models what any may know.
    own = arguments.model in (None, DEMO_NAME, str(CHECKPOINT))
    preset = arguments.preset or "reference"
    options: dict[str, Any] = {
        "prompts": arguments.prompts,
        "tasks": arguments.task or (None if own else list(QUESTIONS)),
        "kv_bits": arguments.kv_bits,
    }
    quiet = not messages.is_terminal
    with Progress(console=messages, transient=True, disable=quiet) as progress:
        options["track"] = lambda names: progress.track(names, description="tasks")
        if arguments.against is None:
            tasks = measure(model, tokenizer, preset=preset, **options)
            return {"tasks": tasks, "overall": overall(tasks)}
        pairs = side_by_side(model, tokenizer, (arguments.against, preset), **options)
    right = [float(pair.first.right) for pair in pairs], [float(p.second.right) for p in pairs]
    return {
        "against": arguments.against,
        **summary(pairs),
        "difference": asdict(compare(*right)),
    }


def show_against(found: dict[str, Any], preset: str, console: Console) -> None:
    """Each task and all together, the reference side first."""
    sides = {"first": found["against"], "second": preset}
    # A word a line: the numbers need the 80 columns of an ordinary terminal.
    table = figures(
        "task", "preset", "right", "steps\nper\nblock", "positions\nper\ntoken",
        "ms per\ntoken", "fell\nback", "same\ntext", "n",
    )  # fmt: skip
    for task, values in {**found["tasks"], "all": found["all"]}.items():
        for side, name in sides.items():
            own = values[side]
            table.add_row(
                task if side == "first" else "",
                name,
                f"{own['right']:.3f} ± {own['error']:.3f}",
                f"{own['steps']:.1f}",
                f"{own['positions_per_token']:.1f}",
                f"{own['ms_per_token']:.1f}",
                f"{own['fell_back']:.0f}",
                str(values["same_text"]) if side == "second" else "",
                str(own["n"]),
            )
    console.print(table)
    console.print(verdict(found["difference"], preset, found["against"]))


def verdict(both: dict[str, Any], preset: str, against: str) -> str:
    """How many more a preset gets right than another, and how far that is chance."""
    if not both["better"] + both["worse"]:
        # The bootstrap has nothing to draw here; Clopper and Pearson's one-sided bound has.
        unseen = 1 - 0.05 ** (1 / both["n"])
        return (
            f"{preset} beside {against}: +0.000 right, judged alike in all questions; with "
            f"{both['n']} of them, up to {unseen:.1%} of such questions may still be judged "
            "differently (95 % bound)."
        )
    return (
        f"{preset} beside {against}: {both['b'] - both['a']:+.3f} right (95 % interval "
        f"{both['low']:+.3f} to {both['high']:+.3f}), better in {both['better']} questions and "
        f"worse in {both['worse']}, p = {both['p']:.2g} ({both['test']})."
    )


def show(found: dict[str, Any], console: Console) -> None:
    table = figures(
        "task", "right", "steps per block", "tokens per forward", "positions per token", "n"
    )
    # One answer says nothing about how much others would differ.
    known = all(values["n"] > 1 for values in found["tasks"].values())
    for task, values in {**found["tasks"], "all": found["overall"]}.items():
        table.add_row(
            task,
            f"{values['right']:.2f}" + (f" ± {values['error']:.2f}" if known else ""),
            f"{values['steps']:.1f}",
            f"{values['tokens_per_forward']:.1f}",
            f"{values['positions_per_token']:.1f}",
            str(values["n"]),
        )
    console.print(table)
