"""The same steps in mlx-vlm, taking turns."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mlx_dgemma.cli.benchmark.subjects import check_prompt
from mlx_dgemma.cli.benchmark.tables import figures
from mlx_dgemma.machine.memory import gigabytes


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from mlx_dgemma.benchmark.synthetic import synthetic_config, write_checkpoint
    from mlx_dgemma.benchmark.versus import THEIRS, compare
    from mlx_dgemma.checkpoint.hub import resolve_model

    check_prompt(arguments)
    with tempfile.TemporaryDirectory(prefix="mlx_dgemma-") as scratch:
        folder = Path(scratch)
        if arguments.synthetic:
            write_checkpoint(folder, synthetic_config(arguments.synthetic, arguments.layers))
        else:
            folder = resolve_model(arguments.model, revision=arguments.revision)
        found = compare(
            folder,
            steps=arguments.steps + 2,
            prompt_tokens=arguments.prompt_tokens,
            rounds=arguments.runs,
        )
    theirs = found[THEIRS]
    for ours in found.values():
        for name in ("step_seconds", "step_cpu_seconds", "bytes_above_weights"):
            ours[f"{name}_ratio"] = ours[name] / max(1e-9, theirs[name])
    return found


def show(found: dict[str, Any], console: Console) -> None:
    table = figures("", "ms per step", "CPU ms", "above weights", "weights")
    for name, values in found.items():
        table.add_row(
            name,
            f"{values['step_seconds'] * 1e3:.4g} ({values['step_seconds_ratio']:.2f})",
            f"{values['step_cpu_seconds'] * 1e3:.4g} ({values['step_cpu_seconds_ratio']:.2f})",
            f"{gigabytes(values['bytes_above_weights'])} "
            f"({values['bytes_above_weights_ratio']:.2f})",
            gigabytes(values["weights_bytes"]),
        )
    console.print(table)
    console.print(Text("in parentheses: as a part of mlx-vlm's", "dim"))
