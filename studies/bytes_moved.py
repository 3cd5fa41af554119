"""Bytes that the launches of one denoising step read and write, counted from the graph MLX builds.

    python studies/bytes_moved.py

Every launch counts what it reads and what it writes: an array that three launches read counts three
times. Views are free, a broadcast counts once, rows that are gathered or written in place count as
what is touched. One canvas of the published shapes in the 4bit recipe, every kernel on, the signal
summed densely. The graph has the six layers of one period, all widths real and 16 experts; the
thirty layers and 128 experts follow from it. Nothing is computed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import mlx.core as mx

CHAINS: Counter[str] = Counter()


def one_launch(chain: Any, **_: Any) -> Any:
    """In place of `mx.compile`, whose launches cannot be traced."""

    def call(*arrays: mx.array) -> Any:
        from mlx_dgemma.benchmark.graph import _placeholder

        outputs = chain(*arrays)
        listed = list(outputs) if isinstance(outputs, tuple) else [outputs]
        CHAINS["elementwise chains"] += sum(one.nbytes for one in (*arrays, *listed))
        known = _placeholder([(one.shape, one.dtype) for one in listed], list(arrays))
        return tuple(known) if isinstance(outputs, tuple) else known[0]

    return call


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    mx.compile = one_launch
    from moved import report  # the modules that it imports compile as they are imported

    report(CHAINS)


if __name__ == "__main__":
    main()
