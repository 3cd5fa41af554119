"""How fast the connection between the processes is."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mlx_dgemma.distributed.team import Leader, Team

_ROUNDS = 30
_WARM = 5


@dataclass(frozen=True)
class Link:
    """latency: seconds of the smallest sum over all ranks. bandwidth: bytes per second of a long
    sum beyond that. sum_seconds: of one array of a canvas' activations, `sum_bytes` long;
    gather_seconds: of the head's statistics; both 0 where nothing was measured."""

    name: str
    ranks: int
    latency: float
    bandwidth: float
    sum_bytes: int = 0
    sum_seconds: float = 0.0
    gather_seconds: float = 0.0

    def seconds(self, collectives: int, nbytes: float) -> float:
        """Of so many collectives that carry so many bytes together."""
        return collectives * self.latency + nbytes / self.bandwidth

    def record(self) -> dict[str, Any]:
        return asdict(self)


def measured(team: Leader, rows: int = 256, width: int = 2816) -> Link:
    """The link of a team, by sums of [rows, width] in 16 bits; a second or two."""
    small = _asked(team, [1, 1], "float32", gather=False)
    large = _asked(team, [rows, width], "bfloat16", gather=False)
    partials = _asked(team, [8, 6, rows], "float32", gather=True)
    nbytes = rows * width * 2
    bandwidth = nbytes / max(large - small, 1e-9)
    return Link("measured here", team.size, small, bandwidth, nbytes, large, partials)


def _asked(team: Leader, shape: list[int], dtype: str, *, gather: bool) -> float:
    team.tell("measure", shape=shape, dtype=dtype, gather=gather)
    return measure(team, shape, dtype, gather)


def measure(team: Team, shape: list[int], dtype: str, gather: bool) -> float:
    """Median seconds of one collective, on all ranks at once."""
    x = mx.ones(shape, getattr(mx, dtype))
    mx.eval(x)
    samples = []
    for _ in range(_WARM + _ROUNDS):
        started = time.perf_counter()
        mx.eval(team.gather(x) if gather else team.sum(x))
        samples.append(time.perf_counter() - started)
    return statistics.median(samples[_WARM:])
