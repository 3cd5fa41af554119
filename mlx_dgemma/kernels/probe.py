"""Self-checks in a process of their own: `python -m mlx_dgemma.kernels.probe` reads
[[operation, shape], ...] as JSON and answers in lines of JSON.

A kernel that hangs or poisons the device's command queue would take the caller with it. Before
each check a line {"begins": number} is written, after it {"ends": number, "findings": {...}}, so
that the caller knows where a process ended that died.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict

from mlx_dgemma.kernels.checking import check
from mlx_dgemma.kernels.registry import Operation
from mlx_dgemma.kernels.table import operations


def answer(requests: str, known: Mapping[str, Operation], write: Callable[[str], object]) -> None:
    """Check what is asked for, one after the other."""
    for number, (name, shape) in enumerate(json.loads(requests)):
        write(json.dumps({"begins": number}))
        write(json.dumps({"ends": number, "findings": asdict(check(known[name], shape))}))


def _write(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    answer(sys.stdin.read(), operations(), _write)
