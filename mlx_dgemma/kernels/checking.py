"""One operation's check: does its kernel give the twin's values, twice the same, and how fast?"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_dgemma.kernels.registry import Call, Operation, Outputs, Probe, Shape

_SAMPLES = 9
_CHAINED = 20  # calls per evaluation of what is done sooner than the host is told of it
_LARGE = 2e-3  # seconds; what takes longer is timed call by call


@dataclass(frozen=True)
class Findings:
    """What a check saw.

    failure: a reason, or None. lasting: whether it would fail for that reason again.
    error: the largest, as a probe's tolerance counts it.
    """

    failure: str | None = None
    lasting: bool = True
    error: float = 0.0
    kernel_ms: float | None = None
    twin_ms: float | None = None


def check(operation: Operation, shape: Shape) -> Findings:
    """Compare kernel and twin on every probe, launch twice, time both on the last.

    Whatever the device or the compiler raises is a finding.
    """
    findings, probe = Findings(), None
    try:
        for number, probe in enumerate(operation.probes(shape)):
            findings = _compare(probe, findings)
            if findings.failure is not None:
                return replace(findings, failure=f"probe {number}: {findings.failure}")
        if probe is None:
            return Findings("no probes for this shape")
        kernel, twin = times(probe)
        return replace(findings, kernel_ms=kernel * 1e3, twin_ms=twin * 1e3)
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        return Findings(f"{type(error).__name__}: {told}", lasting=is_refusal(str(error)))


def is_refusal(message: str) -> bool:
    """Whether a message is the Metal compiler's about a kernel, which it would give again.

    An interrupted compiler is none, nor is a device that is out of memory or busy with others.
    """
    refused = "[metal::Device] Unable to" in message
    return refused and not any(word in message for word in ("XPC", "interrupted"))


def _compare(probe: Probe, before: Findings) -> Findings:
    found, expected = evaluated(probe.metal), evaluated(probe.expected or probe.twin)
    error = largest_error(found, expected, probe.least)
    if [one.dtype for one in found] != [two.dtype for two in _listed(probe.twin())]:
        error = float("inf")
    findings = replace(before, error=max(before.error, error))
    if not error <= probe.tolerance:
        return replace(findings, failure=f"error {error:.3g} above {probe.tolerance:.3g}")
    if largest_error(evaluated(probe.metal), found) != 0.0:
        return replace(findings, failure="two launches gave different values")
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


def _listed(outputs: Outputs) -> list[mx.array]:
    return [outputs] if isinstance(outputs, mx.array) else list(outputs)


def evaluated(run: Call, calls: int = 1) -> list[mx.array]:
    """The outputs of the last of so many calls, each of which waits for the one before."""
    outputs: list[mx.array] = []
    for _ in range(calls):
        outputs = _listed((_after(run, outputs) if outputs else run)())
    mx.eval(outputs)
    return outputs


def _after(run: Call, outputs: list[mx.array]) -> Call:
    """The same call, its first array not before `outputs` are computed."""
    for place, argument in enumerate(run.args):
        arrays = argument if isinstance(argument, tuple) else (argument,)
        if not isinstance(arrays[0], mx.array):
            continue
        first = mx.depends([arrays[0]], outputs)[0]
        if isinstance(argument, mx.array):
            waiting: object = first
        else:  # a named tuple of arrays
            waiting = type(argument)(first, *arrays[1:])
        arguments = (*run.args[:place], waiting, *run.args[place + 1 :])
        return partial(run.func, *arguments, **run.keywords)
    raise ValueError("a probe's call takes no array")


def times(probe: Probe) -> tuple[float, float]:
    """Seconds per call of kernel and twin: medians of samples taken by turns."""
    once = []
    for run in (probe.metal, probe.twin):
        evaluated(run)
        once.append(_seconds(run, 1))
    calls = _CHAINED if min(once) < _LARGE else 1
    samples = [(_seconds(probe.metal, calls), _seconds(probe.twin, calls)) for _ in range(_SAMPLES)]
    kernel, twin = zip(*samples, strict=True)
    return statistics.median(kernel), statistics.median(twin)


def _seconds(run: Call, calls: int) -> float:
    started = time.perf_counter()
    evaluated(run, calls)
    return (time.perf_counter() - started) / calls
