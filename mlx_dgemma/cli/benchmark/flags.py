"""The flags of `mlx_dgemma.benchmark`, and which of its four runs they ask for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_dgemma.checkpoint.known_repositories import DEMO_NAME
from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.benchmark import comparison, counts, quality, times
from mlx_dgemma.cli.command import Parser, command
from mlx_dgemma.decoding.settings import PRESETS
from mlx_dgemma.distributed.starting import launched
from mlx_dgemma.errors import InputError
from mlx_dgemma.files import check_writable
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.machine.reports import report, write_report


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.benchmark",
        description="Time prefill, denoising steps and commits, and a step's components one by "
        "one; or judge answers (--quality), count work (--count), or run mlx-vlm beside "
        "(--compare). Without --model the bundled demo checkpoint is measured.",
    )
    flags.add_model(parser)
    parser.add_argument(
        "--synthetic",
        metavar="NAME",
        help="random weights instead of a checkpoint: the real shapes in a recipe, such as "
        "26b-4bit, or medium, which suits a CPU",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="layers of the synthetic model (default: all)"
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--prompt-tokens", type=flags.positive, default=1024, metavar="N", help="default: 1024"
    )
    group.add_argument(
        "--steps",
        type=flags.positive,
        default=6,
        metavar="N",
        help="denoising steps per run (default: 6)",
    )
    group.add_argument(
        "--runs", type=flags.positive, default=5, metavar="N", help="runs of each (default: 5)"
    )
    group.add_argument(
        "--ceilings",
        action="store_true",
        help="measure this machine's own bandwidth and arithmetic to compare with",
    )
    group.add_argument(
        "--compare", choices=("mlx-vlm",), help="time the same steps in mlx-vlm, taking turns"
    )
    group.add_argument(
        "--count",
        action="store_true",
        help="count a step's launches, operations and bytes, and predict floors for known chips; "
        "nothing is run",
    )
    group.add_argument(
        "--quality",
        action="store_true",
        help="ask fixed questions with a judge: right answers, steps per block, tokens per forward",
    )
    group.add_argument(
        "--prompts",
        type=flags.positive,
        default=20,
        metavar="N",
        help="questions per task of --quality (default: 20)",
    )
    group.add_argument(
        "--task",
        action="append",
        metavar="NAME",
        help="a task of --quality (repeatable; default: all)",
    )
    flags.add_preset(group)
    group.add_argument(
        "--against",
        choices=tuple(PRESETS),
        metavar="PRESET",
        help="ask --quality's questions with this preset as well, question by question, and say "
        "how the two agree: --quality --preset turbo --against reference",
    )
    flags.add_setting(group, "kv_bits")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    output.add_argument("--report", metavar="FILE", help="also write the JSON to a file")
    output.add_argument("--plot", metavar="FILE", help="draw the components as an SVG picture")
    flags.add_version(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    this = machine()
    chosen = [kind for kind, asked in _runs(arguments).items() if asked]
    found = report(
        chosen[0] if chosen else "times",
        this,
        model=arguments.synthetic or flags.public_name(arguments.model or DEMO_NAME),
        preset=arguments.preset or "reference",
        kv_bits=arguments.kv_bits,
    )
    messages = Console(stderr=True, highlight=False, markup=False)
    if arguments.count:
        found["count"] = counts.run(arguments)
    elif arguments.compare:
        found["compare"] = comparison.run(arguments)
    elif arguments.quality:
        found["quality"] = quality.run(arguments, messages)
    else:
        found |= times.run(arguments, this.chip)
    text = json.dumps(found, indent=2)
    if arguments.report is not None:
        write_report(arguments.report, found)
    if arguments.plot is not None:
        times.plot(found, Path(arguments.plot))
    if arguments.json:
        print(text)
    else:
        show(found, Console(highlight=False, markup=False))
    return 0


def _runs(arguments: argparse.Namespace) -> dict[str, Any]:
    """The kind of report of each run that is asked for by a flag -> whether it is."""
    return {
        "count": arguments.count,
        "comparison": arguments.compare,
        "quality": arguments.quality,
    }


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what does not go together, before anything slow."""
    chosen = [name for name in ("count", "compare", "quality") if getattr(arguments, name)]
    if len(chosen) > 1:
        raise InputError(f"--{chosen[0]} and --{chosen[1]} are runs of their own: choose one.")
    if arguments.synthetic and arguments.model:
        raise InputError("--synthetic and --model name two models: choose one.")
    if arguments.layers is not None and not arguments.synthetic:
        raise InputError("--layers shortens a synthetic model: name one with --synthetic.")
    if arguments.quality and arguments.synthetic:
        raise InputError("Random weights answer nothing: --quality needs a checkpoint.")
    if arguments.against and not arguments.quality:
        raise InputError("--against compares two presets' answers: give --quality with it.")
    preset = arguments.preset or "reference"
    if arguments.against == preset:
        raise InputError(
            f"--preset and --against are both {preset}; give two (without --preset: reference)."
        )
    if arguments.compare and launched():
        raise InputError("--compare measures one process: start it without mlx.launch.")
    if arguments.kv_bits is not None and arguments.compare:
        raise InputError("--compare runs the exact context: leave --kv-bits out.")
    if arguments.plot is not None and chosen:
        raise InputError(f"--plot draws the components' times; --{chosen[0]} times none.")
    for name in ("report", "plot"):
        if getattr(arguments, name) is not None:
            check_writable(getattr(arguments, name), f"--{name}")


def show(found: dict[str, Any], console: Console) -> None:
    if "count" in found:
        counts.show(found["count"], console)
    elif "compare" in found:
        comparison.show(found["compare"], console)
    elif "quality" in found:
        if "against" in found["quality"]:
            quality.show_against(found["quality"], found["preset"], console)
        else:
            quality.show(found["quality"], console)
    else:
        times.show(found, console)
