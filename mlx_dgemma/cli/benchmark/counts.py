"""A step's launches, operations and bytes, counted, and the floors predicted from them."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.text import Text

from mlx_dgemma.cli.benchmark.subjects import config_of
from mlx_dgemma.cli.benchmark.tables import figures

WAYS = {
    "written out": "written out",
    "twins": "fused operations in plain MLX",
    "kernels": "every kernel on",
    "here": "the kernels that run on this machine",
}
PREDICTED = "predicted by the roofline model, not measured"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from mlx_dgemma.benchmark.chips import CHIPS
    from mlx_dgemma.benchmark.costs import floor_seconds, step_costs, total
    from mlx_dgemma.benchmark.graph import count_step

    config, kv_bits = config_of(arguments), arguments.kv_bits
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
        "floor_ms_with_dense_self_conditioning": {
            chip.name: floor_seconds(written, chip) * 1e3 for chip in CHIPS.values()
        },
        "floor_ms_with_dense_self_conditioning_in_bfloat16": {
            chip.name: floor_seconds(written, chip.in_bfloat16()) * 1e3
            for chip in CHIPS.values()
            if chip.bfloat16 > 1
        },
    }


def show(found: dict[str, Any], console: Console) -> None:
    console.print(Text("One denoising step, counted", "bold"))
    for way, values in found["launches"].items():
        console.print(f"  {WAYS[way]:<36} {values['launches']:>6} launches")
    table = figures("", "TFLOP", "GB")
    steps = {"sparse step": found["step"], "dense step": found["step_with_dense_self_conditioning"]}
    for name, cost in {**found["components"], **steps}.items():
        table.add_row(name, f"{cost['flops'] / 1e12:.4g}", f"{cost['bytes'] / 1e9:.4g}")
    console.print(table)
    console.print(Text(f"Floors of a step in ms, {found['evidence']}:", "bold"))
    floors = figures("", "sparse steps", "dense steps", "the same in bfloat16")
    slower = found["floor_ms_with_dense_self_conditioning_in_bfloat16"]
    dense = found["floor_ms_with_dense_self_conditioning"]
    for name, floor in found["floor_ms"].items():
        emulated = f"{slower[name]:.3g}" if name in slower else ""
        floors.add_row(name, f"{floor:.3g}", f"{dense[name]:.3g}", emulated)
    console.print(floors)
