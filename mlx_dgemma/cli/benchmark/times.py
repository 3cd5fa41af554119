"""How long prefill, denoising steps and commits take, and a step's components one by one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from mlx_dgemma.cli.benchmark.subjects import model_of
from mlx_dgemma.cli.benchmark.tables import figures
from mlx_dgemma.files import write_text
from mlx_dgemma.machine.memory import gigabytes

if TYPE_CHECKING:
    from mlx_dgemma.benchmark.chips import Chip
    from mlx_dgemma.benchmark.timing import Timing


def run(arguments: argparse.Namespace, chip_name: str | None) -> dict[str, Any]:
    import mlx.core as mx

    from mlx_dgemma.benchmark import chips
    from mlx_dgemma.benchmark.timing import Workload, time_components, time_passes
    from mlx_dgemma.decoding.settings import DecodingSettings

    model = model_of(arguments)
    ranks = 1 if model.team is None else model.team.size
    chip = chips.known(chip_name) if ranks == 1 else None  # a ceiling is one chip's
    if arguments.ceilings and ranks == 1:
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
    # Of several processes rank 0 would time its own part alone.
    components = time_components(model, load) if ranks == 1 else {}
    return {
        "prompt_tokens": load.prompt_tokens,
        "canvas_length": model.config.canvas_length,
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "runs": load.runs,
        "ranks": ranks,
        "ceiling": None if chip is None else _ceiling(chip),
        "passes": {name: _timing(timing, chip) for name, timing in passes.items()},
        "components": {name: _timing(timing, chip) for name, timing in components.items()},
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


def show(found: dict[str, Any], console: Console) -> None:
    console.print(
        Text(
            f"{found['model']}: {found['prompt_tokens']} prompt tokens, a canvas of "
            f"{found['canvas_length']}, {found['dtype']}, median of {found['runs']} runs",
            "bold",
        )
    )
    table = figures("", "ms", "±", "GB/s", "TFLOP/s", "of roofline")
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
    if found["ranks"] > 1:
        note = f"{found['ranks']} processes together; the memory is that of rank 0"
    elif ceiling is None:
        note = "This chip is not in the table; --ceilings measures what it can do."
    else:
        note = (
            f"roofline: {ceiling['name']}, {ceiling['gigabytes_per_second']:.3g} GB/s and "
            f"{ceiling['teraflops']:.3g} TFLOP/s ({ceiling['source']})"
        )
    console.print(Text(note, "dim"), soft_wrap=True)
    above = gigabytes(found["peak_bytes_above_weights"])
    console.print(
        Text(f"memory: {gigabytes(found['weights_bytes'])} weights, {above} above", "dim")
    )


def plot(found: dict[str, Any], path: Path) -> None:
    from mlx_dgemma.benchmark.bar_chart import svg

    note = "bar: median of the runs, line: their spread"
    if found["ceiling"] is not None:
        note += f", mark: the floor of {found['ceiling']['name']} ({found['ceiling']['source']})"
    shown = {"whole step": found["passes"]["step"], **found["components"]}
    write_text(path, svg(f"A denoising step of {found['model']}", shown, note))
