"""How every kernel is run in the emulator: the checks, the schedules, and what a GPU may do
otherwise.
"""

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
every_setting = pytest.mark.parametrize("setting", list(SETTINGS))

skip = pytest.mark.skipif(
    toolchain.reason_to_skip() is not None, reason=str(toolchain.reason_to_skip())
)


def emulated(setting: str = "checked"):
    """Context in which the package's kernels run in the emulator."""
    mode, options = SETTINGS[setting]
    return installed(mode, options)
