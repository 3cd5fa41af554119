"""`mlx_dgemma.benchmark`: what a model costs on this machine, and what its answers are worth."""

from mlx_dgemma.cli.benchmark.flags import build_parser, main

__all__ = ["build_parser", "main"]
