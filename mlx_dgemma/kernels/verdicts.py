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
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.kernels.checking import Findings
from mlx_dgemma.kernels.registry import Operation, Shape

_MARGIN = 0.95
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
    """Every verdict in the cache; a file that cannot be read counts as empty."""
    try:
        stored = json.loads(cache_file().read_text())
        return {key: Verdict(**value) for key, value in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(found: Mapping[str, Verdict]) -> None:
    """Add verdicts to the cache; no error where it cannot be written."""
    path = cache_file()
    stored = {**remembered(), **found}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({name: asdict(value) for name, value in stored.items()}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        _log.info("kernel verdicts are not kept: %s", error)
