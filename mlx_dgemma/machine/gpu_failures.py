"""What MLX raises when the GPU gives up, as one sentence with the way out.

macOS ends a GPU's work that has no memory left, takes too long, or holds up the screen; MLX then
raises a RuntimeError with Metal's own words from whatever waited for the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_dgemma.errors import DGemmaError, GpuError, GpuMemoryError
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.machine.memory import usable

_FAILED = "[METAL] Command buffer execution failed"
_NO_MEMORY = ("Insufficient Memory", "OutOfMemory")
_NOT_ALLOCATED = ("[metal::malloc]", "[malloc", "Unable to allocate", "std::bad_alloc")
_WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"


@contextmanager
def explained() -> Iterator[None]:
    """Turns a failure of the GPU inside into a GpuError or GpuMemoryError, and leaves this thread
    able to compute; whatever was not computed yet is lost. Other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = explanation(error)
        if told is None:
            raise
        _recover()
        raise told from error


def explanation(error: BaseException) -> DGemmaError | None:
    """The sentence for the user; None for anything but a failure of the GPU or of its memory."""
    text = str(error)
    failed = _FAILED in text
    if isinstance(error, MemoryError) or any(word in text for word in _NOT_ALLOCATED):
        return GpuMemoryError(f"The memory ran out: {_less_memory()}.")
    if not failed or not isinstance(error, RuntimeError):
        return None
    if any(word in text for word in _NO_MEMORY):
        return GpuMemoryError(f"The GPU ran out of memory: {_less_memory()}.")
    if "Interactivity" in text:
        return GpuError(
            "macOS stopped the GPU's work because the screen had to wait for it: close other "
            "programs that use the GPU, let the display sleep, or start this one with "
            f"{_WATCHDOG} in its environment, which lets the screen wait longer."
        )
    if "Timeout" in text:
        return GpuError(
            "macOS stopped the GPU's work because one piece of it took too long: close other "
            "programs that use the GPU, or start this one with MLX_MAX_OPS_PER_BUFFER=8 in its "
            f"environment, which sends smaller pieces, or with {_WATCHDOG}, which allows longer "
            "ones."
        )
    reason = text.partition(_FAILED)[2].strip(" :.") or "without a reason"
    return GpuError(
        f"The GPU gave up its work ({reason}): run this again, and restart the Mac if it fails "
        "again."
    )


def _less_memory() -> str:
    here, raise_it = machine(), ""
    room = usable(here)
    if here.metal and here.limit is not None and room is not None and here.limit < room:
        raise_it = f"raise its limit (sudo sysctl iogpu.wired_limit_mb={room >> 20}), "
    return (
        f"close other programs, {raise_it}keep the context in 8 bits (--kv-bits 8), or use a "
        "checkpoint with fewer bits"
    )


def _recover() -> None:
    """A stream whose work failed takes no more: this thread's next work gets another."""
    device = mx.default_device()
    if device == mx.Device(mx.gpu):
        mx.set_default_stream(mx.new_stream(device))
    mx.clear_cache()
