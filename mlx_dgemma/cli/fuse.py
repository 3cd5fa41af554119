"""`mlx_dgemma.fuse`: an adapter merged into its model's weights, or rewritten in PEFT's form."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mlx_dgemma.checkpoint.hub import demo_path
from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.command import Parser, command
from mlx_dgemma.errors import InputError
from mlx_dgemma.machine.memory import gigabytes


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.fuse",
        description="Merges an adapter into the weights it was trained beside. A quantized "
        "matrix is merged in full precision and quantized again as it was.",
    )
    flags.add_source(parser)
    parser.add_argument(
        "--adapter-path", default="adapters", metavar="FOLDER", help="default: adapters"
    )
    parser.add_argument(
        "--save-path", default="fused_model", metavar="FOLDER", help="default: fused_model"
    )
    parser.add_argument("--dequantize", action="store_true", help="write every matrix in 16 bits")
    parser.add_argument("--upload-repo", metavar="REPO", help="then upload it to the Hub")
    parser.add_argument(
        "--peft",
        action="store_true",
        help="write the adapter in PEFT's form to --save-path instead, for transformers",
    )
    flags.add_version(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    save = Path(arguments.save_path)
    if os.path.lexists(save) and not (save.is_dir() and not any(save.iterdir())):
        raise InputError(f"{save} is there already: name another --save-path.")
    if arguments.peft:
        from mlx_dgemma.training.export import to_peft

        if arguments.dequantize or arguments.upload_repo:
            raise InputError("--peft writes an adapter alone: leave out the other flags.")
        to_peft(Path(arguments.adapter_path), save)
        print(f"Wrote the adapter in PEFT's form to {save}.")
        return 0

    from mlx_dgemma.convert import convert

    report = convert(
        arguments.model or demo_path(),
        save,
        revision=arguments.revision,
        adapter_path=arguments.adapter_path,
        dequantize=arguments.dequantize,
        requantize=not arguments.dequantize,
        upload_repo=arguments.upload_repo,
    )
    print(f"Fused {arguments.adapter_path} into {report.target}, {gigabytes(report.total_size)}.")
    return 0
