"""`mlx_dgemma.benchmark`: what a model costs on this machine, and what its answers are worth."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from mlx_dgemma._version import __version__
from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.command import Parser, command
from mlx_dgemma.cli.session import DEMO_NAME, check_writable
from mlx_dgemma.errors import InputError
from mlx_dgemma.hardware import machine
from mlx_dgemma.memory import gigabytes

if TYPE_CHECKING:
    from mlx_dgemma.benchmark.chips import Chip
    from mlx_dgemma.benchmark.passes import Timing
    from mlx_dgemma.model import Model
    from mlx_dgemma.model.config import ModelConfig

PREDICTED = "predicted by the roofline model, not measured"


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
    flags.add_kv_bits(group)
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
    found: dict[str, Any] = {
        "mlx_dgemma": __version__,
        "machine": this.record(),
        "model": arguments.synthetic or arguments.model or DEMO_NAME,
        "preset": arguments.preset or "reference",
        "kv_bits": arguments.kv_bits,
    }
    messages = Console(stderr=True, highlight=False)
    if arguments.count:
        found["count"] = _count(arguments)
    elif arguments.compare:
        found["compare"] = _compare(arguments)
    elif arguments.quality:
        found["quality"] = _quality(arguments, messages)
    else:
        found |= _time(arguments, this.chip)
    text = json.dumps(found, indent=2)
    if arguments.report is not None:
        Path(arguments.report).write_text(text + "\n")
    if arguments.plot is not None:
        _plot(found, Path(arguments.plot))
    if arguments.json:
        print(text)
    else:
        show(found, Console(highlight=False))
    return 0


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
    if arguments.kv_bits is not None and arguments.compare:
        raise InputError("--compare runs the exact context: leave --kv-bits out.")
    if arguments.plot is not None and chosen:
        raise InputError(f"--plot draws the components' times; --{chosen[0]} times none.")
    for name in ("report", "plot"):
        if getattr(arguments, name) is not None:
            check_writable(getattr(arguments, name), name)


def _config(arguments: argparse.Namespace) -> ModelConfig:
    """The model's shapes, without reading a weight."""
    from mlx_dgemma.benchmark.synthetic import synthetic_config
    from mlx_dgemma.hub import resolve_model
    from mlx_dgemma.model.config import ModelConfig

    if arguments.synthetic:
        return ModelConfig.from_dict(synthetic_config(arguments.synthetic, arguments.layers))
    return ModelConfig.from_folder(resolve_model(arguments.model, revision=arguments.revision))


def _model(arguments: argparse.Namespace) -> Model:
    from mlx_dgemma.benchmark.synthetic import synthetic_config, synthetic_model
    from mlx_dgemma.hub import resolve_model
    from mlx_dgemma.memory import check_fits, plan
    from mlx_dgemma.model import load_model

    if not arguments.synthetic:
        folder = resolve_model(arguments.model, revision=arguments.revision)
        return load_model(folder, adapter_path=arguments.adapter_path)
    wanted = plan(
        _config(arguments), context_tokens=arguments.prompt_tokens, kv_bits=arguments.kv_bits
    )
    check_fits(wanted, machine(), name=arguments.synthetic)
    return synthetic_model(synthetic_config(arguments.synthetic, arguments.layers))


def _time(arguments: argparse.Namespace, chip_name: str | None) -> dict[str, Any]:
    import mlx.core as mx

    from mlx_dgemma.benchmark import chips
    from mlx_dgemma.benchmark.passes import Workload, time_components, time_passes
    from mlx_dgemma.decoding.settings import DecodingSettings

    model = _model(arguments)
    chip = chips.known(chip_name)
    if arguments.ceilings:
        chip = chips.measured(chip_name or "this machine", model.dtype)
    load = Workload(
        prompt_tokens=arguments.prompt_tokens,
        steps=arguments.steps + 1,
        runs=arguments.runs,
        settings=DecodingSettings.from_defaults(
            model.config.generation, {"preset": arguments.preset, "kv_bits": arguments.kv_bits}
        ),
    )
    mx.reset_peak_memory()
    weights = mx.get_active_memory()
    passes = time_passes(model, load)
    peak = mx.get_peak_memory()
    return {
        "prompt_tokens": load.prompt_tokens,
        "canvas_length": model.config.canvas_length,
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "runs": load.runs,
        "ceiling": None if chip is None else _ceiling(chip),
        "passes": {name: _timing(timing, chip) for name, timing in passes.items()},
        "components": {
            name: _timing(timing, chip) for name, timing in time_components(model, load).items()
        },
        "weights_bytes": weights,
        "peak_bytes_above_weights": peak - weights,
    }


def _timing(timing: Timing, chip: Chip | None) -> dict[str, Any]:
    floor = None if chip is None else chip.seconds(timing.cost.flops, timing.cost.nbytes)
    return {
        **timing.record(),
        "floor_ms": None if floor is None else floor * 1e3,
        "roofline_fraction": None if floor is None else floor / timing.median,
    }


def _ceiling(chip: Chip) -> dict[str, Any]:
    return {
        "name": chip.name,
        "gpu_cores": chip.cores or None,
        "gigabytes_per_second": chip.bandwidth / 1e9,
        "teraflops": chip.flops / 1e12,
        "source": chip.source,
    }


def _count(arguments: argparse.Namespace) -> dict[str, Any]:
    from mlx_dgemma.benchmark.chips import CHIPS
    from mlx_dgemma.benchmark.costs import floor_seconds, step_costs, total
    from mlx_dgemma.benchmark.graph import count_step

    config, kv_bits = _config(arguments), arguments.kv_bits
    costs, written = (
        step_costs(config, arguments.prompt_tokens, conditioning=kind, kv_bits=kv_bits)
        for kind in ("sparse", "dense")
    )
    return {
        "prompt_tokens": arguments.prompt_tokens,
        "launches": count_step(config),
        "components": {name: cost.record() for name, cost in costs.items()},
        "step": total(costs).record(),
        "step_with_dense_self_conditioning": total(written).record(),
        "host_reads_per_step": 1,
        "evidence": PREDICTED,
        "floor_ms": {chip.name: floor_seconds(costs, chip) * 1e3 for chip in CHIPS.values()},
    }


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    from mlx_dgemma.benchmark.synthetic import synthetic_config, write_checkpoint
    from mlx_dgemma.benchmark.versus import THEIRS, compare
    from mlx_dgemma.hub import resolve_model

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


def _quality(arguments: argparse.Namespace, messages: Console) -> dict[str, Any]:
    from mlx_dgemma.api import load
    from mlx_dgemma.benchmark.quality import measure, overall

    model, tokenizer = load(
        arguments.model, revision=arguments.revision, adapter_path=arguments.adapter_path
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


def _plot(found: dict[str, Any], path: Path) -> None:
    from mlx_dgemma.benchmark.plot import svg

    note = "bar: median of the runs, line: their spread"
    if found["ceiling"] is not None:
        note += f", mark: the floor of {found['ceiling']['name']} ({found['ceiling']['source']})"
    shown = {"whole step": found["passes"]["step"], **found["components"]}
    path.write_text(svg(f"A denoising step of {found['model']}", shown, note))


def show(found: dict[str, Any], console: Console) -> None:
    if "count" in found:
        _show_count(found["count"], console)
    elif "compare" in found:
        _show_compare(found["compare"], console)
    elif "quality" in found:
        _show_quality(found["quality"], console)
    else:
        _show_times(found, console)


def _show_times(found: dict[str, Any], console: Console) -> None:
    console.print(
        Text(
            f"{found['model']}: {found['prompt_tokens']} prompt tokens, a canvas of "
            f"{found['canvas_length']}, {found['dtype']}, median of {found['runs']} runs",
            "bold",
        )
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for title in ("ms", "±", "GB/s", "TFLOP/s", "of roofline"):
        table.add_column(title, justify="right")
    for group in ("passes", "components"):
        for name, values in found[group].items():
            share = values["roofline_fraction"]
            table.add_row(
                name,
                f"{values['ms']:.4g}",
                f"{values['spread_ms']:.2g}",
                f"{values['gigabytes_per_second']:.3g}",
                f"{values['teraflops']:.3g}",
                "" if share is None else f"{share:.0%}",
            )
        table.add_section()
        table.add_row()
    console.print(table)
    ceiling = found["ceiling"]
    if ceiling is None:
        told = "This chip is not in the table; --ceilings measures what it can do."
    else:
        told = (
            f"roofline: {ceiling['name']}, {ceiling['gigabytes_per_second']:.3g} GB/s and "
            f"{ceiling['teraflops']:.3g} TFLOP/s ({ceiling['source']})"
        )
    console.print(Text(told, "dim"), soft_wrap=True)
    above = gigabytes(found["peak_bytes_above_weights"])
    console.print(
        Text(f"memory: {gigabytes(found['weights_bytes'])} weights, {above} above", "dim")
    )


def _show_count(found: dict[str, Any], console: Console) -> None:
    console.print(Text("One denoising step, counted", "bold"))
    for way, values in found["launches"].items():
        console.print(f"  {way:<12} {values['launches']:>6} launches")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    table.add_column("TFLOP", justify="right")
    table.add_column("GB", justify="right")
    for name, cost in {**found["components"], "step": found["step"]}.items():
        table.add_row(name, f"{cost['flops'] / 1e12:.4g}", f"{cost['bytes'] / 1e9:.4g}")
    console.print(table)
    console.print(Text(f"Floors of a step in ms, {found['evidence']}:", "bold"))
    for name, floor in found["floor_ms"].items():
        console.print(f"  {name:<15} {floor:>8.1f}")


def _show_compare(found: dict[str, Any], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("", "ms per step", "CPU ms", "above weights", "weights"):
        table.add_column(title, justify="right" if title else "left")
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


def _show_quality(found: dict[str, Any], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("task", "right", "steps per block", "tokens per forward", "n"):
        table.add_column(title, justify="left" if title == "task" else "right")
    for task, figures in {**found["tasks"], "all": found["overall"]}.items():
        table.add_row(
            task,
            f"{figures['right']:.2f} ± {figures['error']:.2f}",
            f"{figures['steps']:.1f}",
            f"{figures['tokens_per_forward']:.1f}",
            str(figures["n"]),
        )
    console.print(table)
