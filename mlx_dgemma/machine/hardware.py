"""What this machine is: chip, cores, memory, Python, and what MLX says about its device.

Reads, never changes. Whatever cannot be read is None; nothing here is fatal anywhere.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

MB = 1 << 20


@dataclass(frozen=True)
class Machine:
    """The facts that decide what fits and how fast it may run. Sizes are bytes.

    system: "macOS 15.5" or "Linux 6.1". architecture: "arm64", "x86_64", ...
    native: False when Python runs translated (Rosetta), where MLX has no Metal build.
    memory: physical memory. available: what could be had now without paging.
    working_set: what the GPU may keep resident by default; None without Metal.
    wired_limit: the user's own limit (sysctl iogpu.wired_limit_mb); None where it is the default.
    device: MLX's default device and its own description of it.
    """

    system: str
    architecture: str
    native: bool
    chip: str | None
    cores: int
    performance_cores: int | None
    memory: int | None
    available: int | None
    working_set: int | None
    wired_limit: int | None
    python: str
    mlx: str | None
    metal: bool
    device: dict[str, Any] = field(default_factory=dict)

    @property
    def limit(self) -> int | None:
        """Bytes a model may occupy: the GPU's working set, else physical memory."""
        return self.wired_limit or self.working_set or self.memory

    def record(self) -> dict[str, Any]:
        """Everything as a JSON-ready object."""
        return asdict(self)


@dataclass(frozen=True)
class Conditions:
    """What slows a machine down now, in macOS' own terms; None where it cannot be read.

    memory_pressure: "normal", "warning" or "critical". thermal: "no warning", "warning level 1"
    or "processor held to 80 %". power: "AC Power", "Battery Power" or "UPS Power".
    low_power_mode: whether the user or the battery asked for it.
    """

    memory_pressure: str | None = None
    thermal: str | None = None
    power: str | None = None
    low_power_mode: bool | None = None

    def record(self) -> dict[str, Any]:
        """Everything as a JSON-ready object."""
        return asdict(self)


def conditions() -> Conditions:
    """Reads them; takes a moment, since macOS' power manager is asked three times."""
    source = re.search(r"drawing from '([^']+)'", _pmset("batt"))
    low = re.search(r"lowpowermode\s+(\d)", _pmset())
    return Conditions(
        memory_pressure={"1": "normal", "2": "warning", "4": "critical"}.get(
            _sysctl("kern.memorystatus_vm_pressure_level") or ""
        ),
        thermal=_thermal(_pmset("therm")),
        power=source and source[1],
        low_power_mode=low and low[1] == "1",
    )


def machine() -> Machine:
    """Reads this machine's facts; takes a few milliseconds."""
    device, metal, mlx = _mlx()
    mac = sys.platform == "darwin"
    return Machine(
        system=f"macOS {platform.mac_ver()[0]}" if mac else _system(),
        architecture=platform.machine(),
        native=_sysctl("sysctl.proc_translated") != "1",
        chip=_sysctl("machdep.cpu.brand_string") if mac else _linux_chip(),
        cores=os.cpu_count() or 1,
        performance_cores=_number(_sysctl("hw.perflevel0.logicalcpu")),
        memory=_number(_sysctl("hw.memsize")) if mac else _linux_memory("MemTotal"),
        available=_mac_available() if mac else _linux_memory("MemAvailable"),
        working_set=_number(device.get("max_recommended_working_set_size")),
        wired_limit=_wired_limit(),
        python=platform.python_version(),
        mlx=mlx,
        metal=metal,
        device=device,
    )


def _system() -> str:
    return f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"


def _mlx() -> tuple[dict[str, Any], bool, str | None]:
    """(device description, whether it is Metal, version); empty where MLX cannot be imported."""
    try:
        import mlx.core as mx
    except ImportError:
        return {}, False, None
    described = dict(mx.device_info())
    kind = mx.default_device().type
    metal = mx.metal.is_available() and kind == mx.gpu
    return {"type": "gpu" if kind == mx.gpu else "cpu", **described}, metal, version("mlx")


def _sysctl(name: str) -> str | None:
    """One value of macOS' sysctl; None elsewhere or when there is no such value."""
    return _printed("/usr/sbin/sysctl", "-n", name) or None


def _pmset(*what: str) -> str:
    """A page of macOS' power manager; empty elsewhere."""
    return _printed("/usr/bin/pmset", "-g", *what)


def _printed(*command: str) -> str:
    """What a command of macOS prints; empty elsewhere or when it fails."""
    if sys.platform != "darwin":
        return ""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _thermal(page: str) -> str | None:
    """`pmset -g therm` in a few words."""
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", page)
    if limit and limit[1] != "100":
        return f"processor held to {limit[1]} %"
    level = re.search(r"[Tt]hermal warning level (?:set to|=)\s*(\d+)", page)
    if level and level[1] != "0":
        return f"warning level {level[1]}"
    told = limit or level or "No thermal warning level" in page
    return "no warning" if told else None


def _wired_limit() -> int | None:
    megabytes = _number(_sysctl("iogpu.wired_limit_mb"))
    return megabytes * MB if megabytes else None


def _mac_available() -> int | None:
    """Free, inactive and speculative pages: what macOS gives away without paging."""
    pages = [
        _number(_sysctl(f"vm.{name}"))
        for name in ("page_free_count", "page_pageable_external_count", "page_speculative_count")
    ]
    size = _number(_sysctl("hw.pagesize"))
    known = [page for page in pages if page is not None]
    return sum(known) * size if known and size else None


def _linux_chip() -> str | None:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or None


def _linux_memory(name: str) -> int | None:
    """A line of /proc/meminfo, lowered to the control group's limit where there is one."""
    for line in _lines("/proc/meminfo"):
        if line.startswith(f"{name}:"):
            size = int(line.split()[1]) * 1024
            limit = _number(next(iter(_lines("/sys/fs/cgroup/memory.max")), None))
            return min(size, limit) if limit else size
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
