"""`mlx_dgemma.doctor`: what this machine is, which model fits it, and what its kernels do."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_dgemma.checkpoint.known_repositories import (
    KNOWN_REPOSITORIES,
    LONGEST_CONTEXT,
    LONGEST_CONTEXT_BYTES,
)
from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli import doctor_link
from mlx_dgemma.cli.command import Parser, command
from mlx_dgemma.files import check_writable
from mlx_dgemma.machine.hardware import Conditions, Machine, machine
from mlx_dgemma.machine.memory import gigabytes, usable
from mlx_dgemma.machine.reports import report, write_report

GIB = 1 << 30


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.doctor",
        description="Describe this machine, which of the known models fit it, and the state of "
        "the Metal kernels.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--report", metavar="FILE", help="also write the JSON report to a file")
    parser.add_argument(
        "--check",
        nargs="?",
        const="",
        metavar="MODEL",
        help="compare every kernel with its twin, and time both, in the shapes of a model: a "
        "folder or Hub id, by default the published 4-bit checkpoint; also what was checked "
        "before (Metal only)",
    )
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="",
        metavar="MODEL",
        help="under mlx.launch: measure the connection between the machines, and predict whether "
        "they are faster together, for a model as with --check",
    )
    parser.add_argument(
        "--audit",
        metavar="MODEL",
        help="run a model, a folder or Hub id, and measure whether float16 would hold its numbers; "
        "on M1 and M2 it is then loaded in float16, which is faster there (--dtype bfloat16 does "
        "not)",
    )
    flags.add_version(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.report is not None:  # before minutes of checks, whose result it is to hold
        check_writable(arguments.report, "--report")
    found = examine(machine(), check=arguments.check, audited=arguments.audit)
    if arguments.distributed is not None:
        found["distributed"] = doctor_link.examine(arguments.distributed)
    text = json.dumps(found, indent=2)
    if arguments.report is not None:
        write_report(arguments.report, found)
    if arguments.json:
        print(text)
    else:
        show(found, Console(highlight=False, markup=False))
        if "distributed" in found:
            doctor_link.show(found["distributed"], Console(highlight=False, markup=False))
    return 0


def examine(
    this: Machine, *, check: str | None = None, audited: str | None = None
) -> dict[str, Any]:
    """The whole report, JSON-ready; it names no user, no path and no prompt.

    check: check the kernels for this model first; "" is the published one, None checks nothing.
    audited: audit this model's magnitudes first.
    """
    from mlx_dgemma.checkpoint import audits
    from mlx_dgemma.kernels.verdict_report import age
    from mlx_dgemma.kernels.verdict_report import report as kernels

    if check is not None:
        check_kernels(check)
    if audited is not None:
        audit_magnitudes(audited)
    return report(
        "doctor",
        this,
        usable_memory=usable(this),
        disk_free=shutil.disk_usage(_cache()).free,
        concerns=concerns(this),
        models=[
            {
                "repository": known.id,
                "about": known.about,
                "weight_bytes": known.weight_bytes,
                "exact": known.exact,
                "memory_bytes": known.memory_bytes,
                "fits": verdict(known.memory_bytes, this),
            }
            for known in KNOWN_REPOSITORIES
        ],
        longest_context={
            "tokens": LONGEST_CONTEXT,
            "exact_bytes": LONGEST_CONTEXT_BYTES[None],
            "kv_bits_8_bytes": LONGEST_CONTEXT_BYTES[8],
        },
        kernels=kernels(),
        float16=[
            {
                "checkpoint": key[:12],
                **asdict(known),
                "passed": known.failure is None,
                "failure": known.failure,
                "unit": known.unit,
                "age": age(known.when),
            }
            for key, known in audits.everything().items()
        ],
    )


def audit_magnitudes(model: str) -> None:
    """Audit a model and remember what was found; see checkpoint.audits."""
    from mlx_dgemma.benchmark.overflow import audit
    from mlx_dgemma.checkpoint import audits
    from mlx_dgemma.checkpoint.plan import prepare
    from mlx_dgemma.machine.gpu_failures import explained

    folder, _ = prepare(model)
    with explained():
        audits.remember(folder, audit(folder))


def check_kernels(model: str) -> None:
    """Check every kernel that a model can use, known or not; "" is the published checkpoint."""
    from mlx_dgemma.benchmark.synthetic import synthetic_config
    from mlx_dgemma.kernels import dispatch
    from mlx_dgemma.model.config import ModelConfig
    from mlx_dgemma.model.kernel_shapes import kernel_shapes

    if model:
        from mlx_dgemma.checkpoint.hub import resolve_model

        config = ModelConfig.from_folder(resolve_model(model))
    else:
        config = ModelConfig.from_dict(synthetic_config("26b-4bit"))
    dispatch.prepare(kernel_shapes(config), again=True)


def concerns(this: Machine) -> list[str]:
    """What stands in the way of running the real model here, in sentences."""
    found = []
    if not this.native:
        found.append("This Python runs translated by Rosetta: install a native arm64 Python.")
    if this.mlx is None:
        found.append("MLX cannot be imported: reinstall it with pip install --force-reinstall mlx.")
    elif not this.metal:
        found.append(
            "There is no Metal device: everything runs on the CPU, which is for tests and the demo."
        )
    if this.system.startswith("macOS") and int(this.system.split()[1].split(".")[0]) < 14:
        found.append(f"{this.system} is too old for MLX: update to macOS 14 or newer.")
    return found


def verdict(needed: int, this: Machine) -> str:
    """yes; tight, when the GPU's default working set must be raised; no; or unknown."""
    room = usable(this)
    if room is None:
        return "unknown"
    if needed > room:
        return "no"
    return "tight" if this.metal and this.limit is not None and needed > this.limit else "yes"


def show(found: dict[str, Any], console: Console) -> None:
    this = found["machine"]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    for name, text in [*_facts(this, found), *_state(Conditions(**found["conditions"]))]:
        facts.add_row(name, text)
    console.print(facts)
    for concern in found["concerns"]:
        console.print(Text(f"! {concern}", "yellow"), soft_wrap=True)

    console.print()
    console.print(_models(found["models"]))
    console.print(Text("needs: with a context of 8,192 tokens; ~: estimated from shapes", "dim"))
    longest = found["longest_context"]
    exact, packed = (gigabytes(longest[f"{kind}_bytes"]) for kind in ("exact", "kv_bits_8"))
    console.print(
        Text(f"{longest['tokens']:,} tokens take {exact}; with --kv-bits 8 {packed}", "dim")
    )
    if any(model["fits"] == "tight" for model in found["models"]):
        console.print(
            Text("tight: raise the limit first, sudo sysctl iogpu.wired_limit_mb=MEGABYTES", "dim")
        )

    kernels = found["kernels"]
    console.print()
    console.print(Text(f"kernels: mode {kernels['mode']}, {kernels['evidence']}", "bold"))
    table = Table.grid(padding=(0, 2))
    for operation in kernels["operations"]:
        table.add_row(f"  {operation['name']}", operation["status"])
    console.print(table)
    for operation in kernels["operations"]:
        for verdict in operation["verdicts"]:
            console.print(Text(_verdict(operation["name"], verdict), "dim"))
    for audit in found["float16"]:
        console.print(Text(_audit(audit), "dim"))


def _verdict(name: str, verdict: dict[str, Any]) -> str:
    """One line: the shape, what runs there and why, and when that was found out."""
    runs = "kernel" if verdict["enabled"] else "twin"
    again = "" if verdict["lasting"] else "; will be checked again"
    return f"  {name} {verdict['shape']}: {runs}, {verdict['reason']} ({verdict['age']}{again})"


def _audit(audit: dict[str, Any]) -> str:
    passed = "would hold" if audit["passed"] else f"would not hold, {audit['failure']}"
    return (
        f"float16 {passed} checkpoint {audit['checkpoint']}: largest {audit['largest']:,.0f}, "
        f"down_proj {audit['branches']:,.0f}, unit {audit['unit']} ({audit['age']})"
    )


def _facts(this: dict[str, Any], found: dict[str, Any]) -> list[tuple[str, str]]:
    cores = f"{this['cores']} cores"
    if this["performance_cores"]:
        cores += f" ({this['performance_cores']} performance)"
    kind = "Metal" if this["metal"] else "CPU"
    memory = [_memory(this["memory"]), f"{gigabytes(found['usable_memory'] or 0)} for a model"]
    if this["available"] is not None:
        memory.append(f"{gigabytes(this['available'])} free now")
    if this["working_set"] is not None:
        memory.append(f"GPU keeps {gigabytes(this['working_set'])}")
    if this["wired_limit"] is not None:
        memory.append(f"wired limit {gigabytes(this['wired_limit'])}")
    return [
        ("machine", f"{this['chip'] or 'unknown chip'}, {cores}, {this['system']}"),
        ("memory", ", ".join(memory)),
        ("disk", f"{gigabytes(found['disk_free'])} free for downloads"),
        ("python", f"{this['python']} {this['architecture']}, mlx {this['mlx']} on {kind}"),
    ]


def _state(now: Conditions) -> list[tuple[str, str]]:
    """What slows the machine down now, where any of it could be read."""
    told = [
        now.memory_pressure and f"memory pressure {now.memory_pressure}",
        now.thermal and f"heat: {now.thermal}",
        now.power,
        "low power mode" if now.low_power_mode else None,
    ]
    return [("now", ", ".join(filter(None, told)))] if any(told) else []


def _models(models: Sequence[dict[str, Any]]) -> Table:
    marks = {"yes": ("yes", "green"), "tight": ("tight", "yellow"), "no": ("no", "red")}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("weights", justify="right", no_wrap=True)
    table.add_column("needs", justify="right", no_wrap=True)
    table.add_column("fits here", no_wrap=True)
    for model in models:
        about = "" if model["exact"] else "~"
        word, style = marks.get(model["fits"], ("?", "dim"))
        table.add_row(
            model["repository"],
            about + gigabytes(model["weight_bytes"]),
            about + gigabytes(model["memory_bytes"]),
            Text(word, style),
        )
    return table


def _memory(size: int | None) -> str:
    return "unknown" if size is None else f"{gigabytes(size)} ({size / GIB:.0f} GiB)"


def _cache() -> Path:
    """The Hub's cache, or its nearest folder that exists."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).expanduser()
    while not os.path.exists(folder):
        folder = folder.parent
    return folder
