"""Fixed questions with a judge: right answers, steps per block, tokens per forward."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mlx_dgemma.cli.benchmark.tables import figures


def run(arguments: argparse.Namespace, messages: Console) -> dict[str, Any]:
    from mlx_dgemma.benchmark.quality import measure, overall
    from mlx_dgemma.checkpoint.loading import load

    model, tokenizer = load(
        arguments.model,
        revision=arguments.revision,
        adapter_path=arguments.adapter_path,
        dtype=arguments.dtype,
        chat_template=arguments.chat_template,
    )
    quiet = not messages.is_terminal
    with Progress(console=messages, transient=True, disable=quiet) as progress:
        tasks = measure(
            model,
            tokenizer,
            prompts=arguments.prompts,
            tasks=arguments.task,
            track=lambda names: progress.track(names, description="tasks"),
            preset=arguments.preset or "reference",
            kv_bits=arguments.kv_bits,
        )
    return {"tasks": tasks, "overall": overall(tasks)}


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
