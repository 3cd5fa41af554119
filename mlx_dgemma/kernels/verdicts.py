"""May this kernel run on this machine? Found out once, in a process of its own, and remembered.

A verdict holds for one (MLX version, system version, chip, kernel and launch code, shape class). A
kernel is enabled if it compiled, agreed with its twin, gave the same values twice, and took less
than 95 percent of the twin's time. Nothing here is fatal: whatever goes wrong keeps the twin and is
logged once.
"""

import functools
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.kernels.registry import Operation, Shape

TIMEOUT = 120.0  # seconds for a self-check, compilation included
_MARGIN = 0.95
_log = logging.getLogger("mlx_dgemma.kernels")


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel may run, why, and what was measured."""

    enabled: bool
    reason: str
    error: float | None = None
    kernel_ms: float | None = None
    twin_ms: float | None = None


def verdict(operation: Operation, shape: Shape, *, again: bool = False) -> Verdict:
    """The remembered verdict, or a new one from a self-check in a subprocess.

    again: check even where a verdict is known; a busy machine may have been in the way.
    """
    key = verdict_key(operation, shape)
    known = None if again else remembered().get(key)
    if known is None:
        _announce()
        _log.info("checking the %s kernel once on this machine", operation.name)
        known = self_check(operation.name, shape)
        _remember(key, known)
        if not known.enabled:
            _log.warning("the %s kernel is off: %s", operation.name, known.reason)
    return known


@functools.cache
def _announce() -> None:
    """Once per process: who waits should know what for."""
    _log.warning(
        "checking Metal kernels, once on this machine for each kind and size of work; this takes "
        "a while, and MLX_DGEMMA_KERNELS=off does without them"
    )


def verdict_key(operation: Operation, shape: Shape) -> str:
    """What a verdict depends on, readable in the cache file."""
    described = " ".join(f"{name}={value}" for name, value in sorted(shape.items()))
    parts = (f"mlx {version('mlx')}", system(), chip(), f"{operation.name} {operation.version}")
    return " | ".join((*parts, described))


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


def command(name: str, shape: Shape) -> list[str]:
    """The self-check's command line."""
    return [sys.executable, "-m", "mlx_dgemma.kernels.probe", name, json.dumps(shape)]


def self_check(name: str, shape: Shape) -> Verdict:
    """Run the probes of an operation in a process that may hang or die."""
    environment = {**os.environ, "MLX_DGEMMA_KERNELS": "off"}
    try:
        done = subprocess.run(
            command(name, shape), capture_output=True, text=True, timeout=TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        return Verdict(False, f"the self-check did not finish within {TIMEOUT:g} s")
    except OSError as error:
        return Verdict(False, f"the self-check could not start: {error}")
    if done.returncode < 0:
        return Verdict(False, f"the self-check died of signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return Verdict(False, f"the self-check failed: {lines[-1][:300]}")
    try:
        return _judge(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        return Verdict(False, "the self-check printed no findings")


def _judge(
    failure: str | None, error: float, kernel_ms: float | None, twin_ms: float | None
) -> Verdict:
    if failure is not None or kernel_ms is None or twin_ms is None:
        return Verdict(False, failure or "the self-check measured nothing", error)
    times = f"{kernel_ms:.3g} ms against the twin's {twin_ms:.3g} ms"
    enabled = kernel_ms < _MARGIN * twin_ms
    reason = f"{'wins with' if enabled else 'no gain above 5 %:'} {times}"
    return Verdict(enabled, reason, error, kernel_ms, twin_ms)


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


def _remember(key: str, new: Verdict) -> None:
    path = cache_file()
    stored = {**remembered(), key: new}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({name: asdict(value) for name, value in stored.items()}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        _log.info("kernel verdicts are not kept: %s", error)
