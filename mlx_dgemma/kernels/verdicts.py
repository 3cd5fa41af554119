"""What was found out about each kernel on this machine, and where that is remembered.

A verdict holds for one (MLX version, system version, chip, kernel and launch code, shape class). A
kernel is enabled if it compiled, agreed with its twin, gave the same values twice, and took less
than 95 percent of the twin's time.
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_dgemma.files import read_bytes, replacing
from mlx_dgemma.kernels.checking import Findings
from mlx_dgemma.kernels.registry import Operation, Shape

_MARGIN = 0.95
_LARGEST = 64 << 20  # bytes of a cache
_log = logging.getLogger("mlx_dgemma.kernels")


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel may run, why, and what was measured.

    lasting: False for what another try may find otherwise: a check that was cut off, a device
        that was out of memory. It is told, and the next program checks again.
    when: seconds since 1970.
    """

    enabled: bool
    reason: str
    error: float | None = None
    kernel_ms: float | None = None
    twin_ms: float | None = None
    lasting: bool = True
    when: float = 0.0


def judge(findings: Findings) -> Verdict:
    """The verdict on what a check found, as of now."""
    kernel, twin, error = findings.kernel_ms, findings.twin_ms, findings.error
    if findings.failure is not None or kernel is None or twin is None:
        reason = findings.failure or "the self-check measured nothing"
        return Verdict(False, reason, error, lasting=findings.lasting, when=time.time())
    enabled = kernel < _MARGIN * twin
    reason = (
        f"{'wins with' if enabled else 'no gain above 5 %:'} {kernel:.3g} ms against the twin's "
        f"{twin:.3g} ms"
    )
    return Verdict(enabled, reason, error, kernel, twin, when=time.time())


def verdict_key(operation: Operation, shape: Shape) -> str:
    """What a verdict depends on, readable in the cache file."""
    described = " ".join(f"{name}={value}" for name, value in sorted(shape.items()))
    parts = (f"mlx {mlx_version()}", system(), chip(), f"{operation.name} {operation.version}")
    return " | ".join((*parts, described))


def mlx_version() -> str:
    """Of the installed package; "bundled" in an app that came without its packages' metadata."""
    try:
        return version("mlx")
    except PackageNotFoundError:
        return "bundled"


def system() -> str:
    """The operating system and its version."""
    release = platform.mac_ver()[0]
    return f"macOS {release}" if release else f"{platform.system()} {platform.release()}"


def chip() -> str:
    """The Metal device's architecture, or the processor where there is none."""
    if mx.metal.is_available():
        info = mx.device_info()
        return str(info.get("architecture") or info.get("device_name"))
    return platform.machine()


def cache_file() -> Path:
    """Where verdicts are kept, in the platform's cache folder."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mlx_dgemma" / "kernels.json"


def remembered() -> dict[str, Verdict]:
    """Every verdict in the cache that can be read."""
    return {
        key: Verdict(**value)
        for key, value in read_cache(cache_file()).items()
        if fits(value, _KINDS)
    }


def remember(found: Mapping[str, Verdict]) -> None:
    """Add verdicts to the cache; no error where it cannot be written."""
    stored = {**remembered(), **found}
    try:
        write_cache(cache_file(), {name: asdict(value) for name, value in stored.items()})
    except OSError as error:
        _log.info("kernel verdicts are not kept: %s", error)


def is_number(value: object) -> bool:
    """Whether this is a number that can be formatted and computed with."""
    return type(value) in (int, float) and abs(cast(float, value)) < 1e300


def _measured(value: object) -> bool:
    return value is None or type(value) in (int, float)


Kinds = Mapping[str, Callable[[object], bool]]
_KINDS: Kinds = {
    "enabled": lambda value: type(value) is bool,
    "reason": lambda value: type(value) is str,
    "error": _measured,
    "kernel_ms": _measured,
    "twin_ms": _measured,
    "lasting": lambda value: type(value) is bool,
    "when": is_number,
}


def fits(value: object, kinds: Kinds) -> bool:
    """Whether a cache's entry has these fields and no others, each of its kind."""
    return (
        isinstance(value, dict)
        and value.keys() == kinds.keys()
        and all(kind(value[name]) for name, kind in kinds.items())
    )


def read_cache(path: Path) -> dict[str, Any]:
    """What earlier runs kept, by name; a file that cannot be read counts as empty."""
    try:
        found = json.loads(read_bytes(path, _LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_cache(path: Path, entries: Mapping[str, Any]) -> None:
    """Writes a cache whole or not at all; OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps(entries, indent=1), encoding="utf-8")
