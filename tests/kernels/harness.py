"""How every kernel is run in the emulator: the checks, the schedules, and what a GPU may do
otherwise.
"""

from contextlib import contextmanager

import mlx.core as mx
import pytest
from msl import toolchain
from msl.emulator import installed
from msl.launch import Options

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Relative to the largest magnitude of an output, for operations whose inputs are in that dtype.
TOLERANCE = {mx.float32: 3e-5, mx.float16: 4e-3, mx.bfloat16: 2e-2}

SETTINGS = {
    "checked": ("checked", Options(schedule="random", seed=0)),
    "checked, another order": ("checked", Options(schedule="random", seed=1)),
    "checked, greedy": ("checked", Options(schedule="greedy random", seed=2)),
    "in order": ("fast", Options(schedule="in order")),
    "reversed, misaligned": ("fast", Options(schedule="reversed", misalign=True)),
    "greedy": ("fast", Options(schedule="greedy random", seed=3)),
    "contracted": ("contract", Options(schedule="random", seed=4)),
    "inexact": ("fast", Options(jitter=4, reduction_order=1, flush_denormals=False)),
    "other sums": ("fast", Options(reduction_order=2)),
}
# The exact checks, and the orders that show what is missing between threads.
ADVERSARIAL = ("checked", "checked, greedy", "reversed, misaligned", "greedy")
every_setting = pytest.mark.parametrize("setting", list(SETTINGS))

# On a Mac the same cases run on the real device; there is nothing to run them on elsewhere.
ON_DEVICE = mx.metal.is_available()
_reason = None if ON_DEVICE else toolchain.reason_to_skip()
skip = pytest.mark.skipif(_reason is not None, reason=str(_reason))
emulator_only = pytest.mark.skipif(
    toolchain.reason_to_skip() is not None, reason=str(toolchain.reason_to_skip())
)


_mutation: list[tuple[str, str, str]] = []


@contextmanager
def emulated(setting: str = "checked"):
    """Context in which the package's kernels run: in the emulator, or on this Mac's device."""
    if ON_DEVICE:
        if setting != "checked":
            pytest.skip("orders of execution are chosen by the emulator alone")
        yield []
        return
    mode, options = SETTINGS[setting]
    with installed(mode, options) as launched:
        real = mx.fast.metal_kernel

        def metal_kernel(*, name, source, header, **keywords):
            for mutated, old, new in _mutation:
                if name == f"dgemma_{mutated}":
                    assert (source + header).count(old) == 1, old
                    source, header = source.replace(old, new), header.replace(old, new)
            return real(name=name, source=source, header=header, **keywords)

        mx.fast.metal_kernel = metal_kernel
        yield launched


@contextmanager
def mutated(kernel: str, old: str, new: str):
    """Context in which one piece of a kernel's text, which must occur once, is another."""
    _mutation.append((kernel, old, new))
    try:
        yield
    finally:
        _mutation.pop()
