"""What a chip could do at best: memory bandwidth and 16-bit matrix arithmetic.

Bandwidth is what Apple states in the chip's technical specifications. Arithmetic of M1 to M4 is
GPU cores x 128 lanes x 2 operations x clock, as tabulated in huggingface.js
(packages/tasks/src/hardware.ts) for the largest GPU of each name; their matrix instructions run on
the same lanes, of which about 80 percent can be kept busy (philipturner/metal-benchmarks). M5 cores
have matrix units of 1,024 16-bit operations per cycle, so those rows hold for the kernels that use
them. These are ceilings of the hardware, not predictions of a time; `measured` finds the ceilings
of the machine at hand instead.

M1 and M2 have no arithmetic for bfloat16. A 4-bit product of 512 rows took 30.6 ms in it on an M1
Max and 17.2 ms in float16 (ml-explore/mlx, pull request 4216); on M2 between 1.06 and 1.34 times as
long was reported.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import mlx.core as mx


@dataclass(frozen=True)
class Chip:
    """bandwidth: bytes per second. flops: 16-bit multiply-add operations per second, counted twice.

    cores: GPU cores of the variant meant; a smaller GPU of the same name does less. source: what
    the figures rest on. bfloat16: how many times as long as in float16 products take in it.
    """

    name: str
    cores: int
    bandwidth: float
    flops: float
    source: str = "stated and tabulated"
    bfloat16: float = 1.0

    def in_bfloat16(self) -> Chip:
        """The same chip, if products are in bfloat16."""
        return replace(self, flops=self.flops / self.bfloat16)

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for that work when arithmetic and memory overlap perfectly."""
        return max(flops / self.flops, nbytes / self.bandwidth)


def _chip(name: str, cores: int, gigabytes: float, teraflops: float, source: str = "") -> Chip:
    return Chip(
        f"Apple {name}",
        cores,
        gigabytes * 1e9,
        teraflops * 1e12,
        source or "stated and tabulated",
        _BFLOAT16.get(name.split()[0], 1.0),
    )


_BFLOAT16 = {"M1": 30.6 / 17.2, "M2": 1.2}
_MATRIX_UNITS = "bandwidth stated; cores x 1,024 x clock"
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("M1", 8, 68, 2.6),
        _chip("M1 Pro", 16, 200, 5.2),
        _chip("M1 Max", 32, 400, 10.4),
        _chip("M1 Ultra", 64, 800, 20.8),
        _chip("M2", 10, 100, 3.6),
        _chip("M2 Pro", 19, 200, 6.8),
        _chip("M2 Max", 38, 400, 13.5),
        _chip("M2 Ultra", 76, 800, 27.2),
        _chip("M3", 10, 100, 4.1),
        _chip("M3 Pro", 18, 150, 6.4),
        _chip("M3 Max", 40, 400, 14.2),
        _chip("M3 Ultra", 80, 819, 28.4),
        _chip("M4", 10, 120, 4.6),
        _chip("M4 Pro", 20, 273, 9.2),
        _chip("M4 Max", 40, 546, 18.4),
        _chip("M5", 10, 153, 16.6, _MATRIX_UNITS),
        _chip("M5 Pro", 20, 307, 33.0, _MATRIX_UNITS),
        _chip("M5 Max", 40, 614, 70.0, _MATRIX_UNITS),
        _chip("M5 Ultra", 80, 1228, 140.0, "assumed: two M5 Max; no figures were stated"),
    )
}


def known(name: str | None) -> Chip | None:
    """The chip of this name, as macOS or MLX spells it; None for any other machine."""
    return CHIPS.get((name or "").strip())


def measured(name: str, dtype: mx.Dtype) -> Chip:
    """This machine's own ceilings: a large square product, and a long array read and written.

    Medians of several runs, a second or two altogether.
    """
    side = 4096 if mx.default_device() == mx.Device(mx.gpu) else 512
    square = mx.random.normal((side, side)).astype(dtype)
    transposed = mx.contiguous(square.T)
    long = mx.zeros((16 * side * side // dtype.size,), dtype)
    mx.eval(square, transposed, long)
    product = _median(lambda: square @ transposed)
    copy = _median(lambda: long + 1)
    return Chip(name, 0, 2 * long.nbytes / copy, 2 * side**3 / product, "measured here")


def _median(run, repeats: int = 9) -> float:  # type: ignore[no-untyped-def]
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        mx.eval(run())
        samples.append(time.perf_counter() - started)
    return statistics.median(samples[2:])
