"""`mlx_dgemma.completion SHELL`: what makes a shell complete these commands and their flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.command import Parser, command
from mlx_dgemma.errors import InputError

SHELLS = ("bash", "zsh", "tcsh")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.completion",
        description="Prints a script for your shell. bash: add to ~/.bashrc "
        "'eval \"$(mlx_dgemma completion bash)\"'. zsh: mlx_dgemma completion zsh > "
        "FOLDER/_mlx_dgemma, in a folder of $fpath.",
    )
    flags.add_version(parser)
    parser.add_argument("shell", choices=SHELLS)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    shell = build_parser().parse_args(argv).shell
    try:
        import shtab
    except ImportError as error:
        raise InputError("Completion needs shtab: pip install 'mlx-dgemma[completion]'.") from error
    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """`mlx_dgemma VERB`, every verb with its flags."""
    from mlx_dgemma.cli.verbs import VERBS

    parser = argparse.ArgumentParser(prog="mlx_dgemma")
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb")
    for verb, about in VERBS.items():
        own = import_module(f"mlx_dgemma.cli.{verb}").build_parser()
        verbs.add_parser(verb, help=about, parents=[own], add_help=False)
    return parser
