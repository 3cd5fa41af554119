"""Self-check and timing of one operation, run as `python -m mlx_dgemma.kernels.probe NAME SHAPE`.

A process of its own, because a kernel that hangs or poisons the device's command queue would take
the caller with it. Prints one line of JSON, the findings that verdicts.py judges.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_dgemma.kernels import registry

_WARM_UP = 3
_TIMED = 21


def check(operation: registry.Operation, shape: registry.Shape) -> dict[str, float | str | None]:
    """Compare kernel and twin on every probe, launch twice, time both on the last.

    Returns {"failure": reason or None, "error": largest relative error, "kernel_ms", "twin_ms"}.
    """
    findings: dict[str, float | str | None] = {
        "failure": None,
        "error": 0.0,
        "kernel_ms": None,
        "twin_ms": None,
    }
    probe = None
    for number, probe in enumerate(operation.probes(shape)):
        found, expected = _evaluated(probe.metal), _evaluated(probe.expected or probe.twin)
        error = largest_error(found, expected, probe.least)
        if [one.dtype for one in found] != [two.dtype for two in _listed(probe.twin())]:
            error = float("inf")
        findings["error"] = max(float(findings["error"] or 0.0), error)
        if not error <= probe.tolerance:
            findings["failure"] = f"probe {number}: error {error:.3g} above {probe.tolerance:.3g}"
            return findings
        if largest_error(_evaluated(probe.metal), found) != 0.0:
            findings["failure"] = f"probe {number}: two launches gave different values"
            return findings
    if probe is None:
        findings["failure"] = "no probes for this shape"
        return findings
    findings["kernel_ms"], findings["twin_ms"] = _median_ms(probe.metal), _median_ms(probe.twin)
    return findings


def largest_error(
    found: Sequence[mx.array], expected: Sequence[mx.array], least: float = 0.0
) -> float:
    """Relative to each expected array's largest magnitude, or to `least` where that is larger.

    Infinite where anything else differs: shapes, kinds of number, integers, places of NaN, or
    something where nothing is expected.
    """
    worst = 0.0
    if len(found) != len(expected):
        return float("inf")
    for one, two in zip(found, expected, strict=True):
        if one.shape != two.shape:
            return float("inf")
        if not mx.issubdtype(two.dtype, mx.floating):
            if one.dtype != two.dtype or not mx.array_equal(one, two).item():
                return float("inf")
            continue
        if not mx.issubdtype(one.dtype, mx.floating):
            return float("inf")
        one, two = one.astype(mx.float32), two.astype(mx.float32)
        if not mx.array_equal(mx.isnan(one), mx.isnan(two)).item():
            return float("inf")
        gap = _largest(mx.nan_to_num(one) - mx.nan_to_num(two))
        scale = max(_largest(mx.nan_to_num(two)), least)
        if gap > 0.0:
            worst = max(worst, gap / scale if scale > 0.0 else float("inf"))
    return worst


def _largest(values: mx.array) -> float:
    return float(np.abs(np.array(values)).max(initial=0.0))


def _listed(outputs: registry.Outputs) -> list[mx.array]:
    return [outputs] if isinstance(outputs, mx.array) else list(outputs)


def _evaluated(run: Callable[[], registry.Outputs]) -> Sequence[mx.array]:
    listed = _listed(run())
    mx.eval(listed)
    return listed


def _median_ms(run: Callable[[], registry.Outputs]) -> float:
    for _ in range(_WARM_UP):
        _evaluated(run)
    samples = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        _evaluated(run)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples) * 1e3


def main(arguments: Sequence[str]) -> int:
    name, shape = arguments
    print(json.dumps(check(registry.operations()[name], json.loads(shape))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
