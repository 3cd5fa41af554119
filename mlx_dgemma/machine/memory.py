"""What of this machine's memory a model may take, and MLX's limits that follow from it."""

from __future__ import annotations

import mlx.core as mx

from mlx_dgemma.machine.hardware import Machine

GB = 1e9
# Left to macOS and other programs; below this a Mac pages and everything crawls.
SYSTEM_RESERVE = 3_000_000_000
# What MLX may keep of freed buffers; it would otherwise grow to the whole machine.
CACHE_LIMIT = 2_000_000_000


def usable(machine: Machine) -> int | None:
    """Bytes that a model may take before macOS pages; None where memory cannot be read."""
    if machine.memory is None:
        return None
    return machine.memory - min(SYSTEM_RESERVE, machine.memory // 4)


def is_short(machine: Machine, needed: int) -> bool:
    """Whether what MLX holds and `needed` bytes more exceed what this machine keeps resident."""
    room = usable(machine)
    if room is not None and machine.metal:
        room = min(room, machine.limit or room)
    return room is not None and mx.get_active_memory() + needed > room


def set_limits(machine: Machine) -> None:
    """Sets MLX's limits: up to the GPU's working set stays wired, allocations beyond what a model
    may take wait for others to be freed, and few freed buffers are kept for reuse. Does nothing
    without Metal."""
    if not machine.metal or machine.working_set is None:
        return
    mx.set_wired_limit(machine.working_set)
    mx.set_memory_limit(max(machine.working_set, usable(machine) or 0))
    mx.set_cache_limit(min(CACHE_LIMIT, machine.working_set // 8))


def gigabytes(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"
