"""mlx_dgemma.convert: convert a checkpoint; `verify PATH` and `inspect PATH` look at one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.command import Parser, command
from mlx_dgemma.cli.exit_codes import USER_ERROR
from mlx_dgemma.errors import InputError
from mlx_dgemma.machine.memory import gigabytes
from mlx_dgemma.model.config import DTYPES

if TYPE_CHECKING:
    from mlx_dgemma.convert.inspection import Inspection

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")

Report = Callable[[str, int, int], None]


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["verify"]:
        return _verify(arguments[1:])
    if arguments[:1] == ["inspect"]:
        return _inspect(arguments[1:])
    return _convert(arguments)


def _convert(arguments: list[str]) -> int:
    args = build_parser().parse_args(arguments)
    from mlx_dgemma.convert import convert
    from mlx_dgemma.convert.plan import grouped
    from mlx_dgemma.convert.recipes import Rule, describe, parse_rule, read_rules

    if args.list_recipes:
        print(describe())
        return 0
    if args.hf_path is None:
        raise InputError("--hf-path is missing: give a folder or a Hub id to convert.")
    rules: list[Rule] = [parse_rule(text) for text in args.q_rule]
    if args.q_rules_file is not None:
        rules = read_rules(Path(args.q_rules_file)) + rules
    with _progress() as progress, _say_how_to_go_on():
        report = convert(
            args.hf_path,
            args.mlx_path,
            quantize=args.quantize,
            recipe=args.recipe,
            q_bits=args.q_bits,
            q_group_size=args.q_group_size,
            q_mode=args.q_mode,
            quant_predicate=args.quant_predicate,
            rules=rules,
            dtype=args.dtype,
            dequantize=args.dequantize,
            to_hf=args.to_hf,
            adapter_path=args.adapter_path,
            revision=args.revision,
            upload_repo=args.upload_repo,
            overwrite=args.overwrite,
            dry_run=args.dry_run,
            measure=args.measure,
            progress=progress,
        )
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
        return 0
    for line in grouped(report.alternatives):
        print(f"note: {line}", file=sys.stderr)
    if report.resumed:
        print(f"kept {len(report.resumed)} finished files of an earlier run", file=sys.stderr)
    verb = "wrote" if report.written else "would write"
    files = "1 file" if len(report.shards) == 1 else f"{len(report.shards)} files"
    print(
        f"{verb} {report.target}: recipe {report.recipe}, {gigabytes(report.total_size)} in "
        f"{files}, {report.bits_per_weight:.2f} bits per weight"
        + (f", {report.seconds:.0f} s" if report.written else "")
    )
    if report.table is not None:
        print(f"\n{report.table}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.convert",
        description="Convert a DiffusionGemma checkpoint. An interrupted conversion goes on "
        "where it was when the same command is run again.",
        epilog="mlx_dgemma.convert verify PATH checks a checkpoint; "
        "mlx_dgemma.convert inspect PATH-OR-HUB-ID prints what it holds and which Macs hold it.",
    )
    add = parser.add_argument
    add("--hf-path", "--model", help="folder or Hub id of the checkpoint to convert")
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--mlx-path", default="mlx_model", help="folder to write (default: %(default)s)")
    add("-q", "--quantize", action="store_true", help="quantize; alone: --recipe 4bit")
    add("--recipe", help="precision by name; --list-recipes prints them")
    add("--list-recipes", action="store_true", help="print the recipes and stop")
    add("--q-bits", type=int, help="bits per weight where the recipe says 4")
    add("--q-group-size", type=int, help="weights that share a scale")
    add("--q-mode", choices=MODES, help="how quantized weights are stored (default: affine)")
    add("--quant-predicate", metavar="MIX", help="one of mlx-lm's mixes, such as mixed_4_6")
    add(
        "--q-rule",
        action="append",
        default=[],
        metavar="PATTERN=PRECISION",
        help="precision of modules by name, such as '*.self_attn.*=6/32' or '*router*=16'; "
        "may be repeated, the last match decides",
    )
    add("--q-rules-file", metavar="FILE", help="the same, one a line or as a JSON object")
    add("--dtype", choices=DTYPES, help="of what is not quantized, and of scales")
    add("-d", "--dequantize", action="store_true", help="undo the source's quantization")
    add("--to-hf", action="store_true", help="write the Hugging Face layout")
    add("--adapter-path", help="folder of a LoRA adapter (of PEFT's or mlx-lm's form) to merge")
    add("--upload-repo", metavar="HUB-ID", help="upload the result")
    add("--overwrite", action="store_true", help="replace a checkpoint at --mlx-path")
    add(
        "--dry-run",
        action="store_true",
        help="print the plan, write nothing; of a Hub id only headers are read",
    )
    add(
        "--measure",
        action="store_true",
        help="compare the recipe and its neighbours with the source: divergence, agreement, "
        "denoising steps; the figures go into the model card",
    )
    add("--json", action="store_true", help="print the report as JSON")
    flags.add_version(parser)
    return parser


def _verify(arguments: list[str]) -> int:
    parser = Parser(prog="mlx_dgemma.convert verify", description="Check a checkpoint.")
    parser.add_argument("path", help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--no-forward", action="store_true", help="do not run the network (needs little memory)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(arguments)
    from mlx_dgemma.convert.verify import verify

    with _progress() as progress:
        result = verify(
            args.path, revision=args.revision, forward=not args.no_forward, progress=progress
        )
    if args.json:
        print(json.dumps(result.as_dict(), indent=2))
    elif result.ok:
        print(f"{args.path}: sound ({', '.join(result.checked)})")
    for problem in () if args.json else result.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 0 if result.ok else USER_ERROR


def _inspect(arguments: list[str]) -> int:
    parser = Parser(
        prog="mlx_dgemma.convert inspect",
        description="Print what a checkpoint holds; of a Hub id only headers are read.",
    )
    parser.add_argument("path", help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args(arguments)
    from mlx_dgemma.convert.inspection import inspect

    found = inspect(args.path, args.revision)
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    print_modules(console, found)
    console.print(
        f"\n{found.tensors:,} tensors, {found.parameters:,} parameters, "
        f"{found.total_size:,} bytes, {found.bits_per_weight:.2f} bits per weight"
    )
    console.print(f"with an 8k context: {gigabytes(found.needed_bytes)} (predicted)")
    words = {"yes": "fits", "raise": "only with a raised iogpu.wired_limit_mb", "no": "too small"}
    for fit in found.fits:
        console.print(f"  Mac with {fit.memory_gb:>3} GB: {words[fit.fits]}")
    return 0


def print_modules(console: Console, found: Inspection) -> None:
    """A table; where the names leave no room for its columns, two lines a module."""
    table = Table(title=found.source, title_justify="left", box=None)
    table.add_column("module", no_wrap=True)
    for column in ("count", "shape", "stored as", "bits", "MB"):
        right = column in ("count", "bits", "MB")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    rows = [
        (
            row.module,
            str(row.count),
            " x ".join(map(str, row.shape)),
            row.stored,
            f"{row.bits_per_weight:.2f}",
            f"{row.nbytes / 1e6:,.2f}",
        )
        for row in found.rows
    ]
    for cells in rows:
        table.add_row(*cells)
    if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
        console.print(table)
        return
    console.print(found.source, style="italic", markup=False, soft_wrap=True)
    for module, count, shape, stored, bits, size in rows:
        times = "" if count == "1" else f"{count} of "
        line = f"{module}\n  {times}{shape}, {stored}: {bits} bits, {size} MB"
        console.print(line, markup=False, soft_wrap=True)


@contextmanager
def _say_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise


@contextmanager
def _progress() -> Iterator[Report | None]:
    """A bar by bytes with the time left on a terminal; nothing when standard error is piped."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield report
