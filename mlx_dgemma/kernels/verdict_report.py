"""What `mlx_dgemma.doctor` tells of the kernels: mode, and each operation's verdicts."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mlx_dgemma.kernels import dispatch, verdicts
from mlx_dgemma.kernels.registry import Operation
from mlx_dgemma.kernels.table import operations
from mlx_dgemma.kernels.verdicts import Verdict

EVIDENCE = "checked by emulation on Linux; not yet run on Apple hardware"


def report() -> dict[str, Any]:
    """Everything as plain values, ready for JSON.

    Keys: mode, metal, mlx, system, chip, evidence, operations; an operation has name, version,
    a one-line status, and verdicts: a list of shape, enabled, reason, age, error, kernel_ms,
    twin_ms, lasting and when.
    """
    usable = dispatch.available() and dispatch.mode() != "off"
    known = verdicts.remembered()
    return {
        "mode": dispatch.mode(),
        "metal": dispatch.available(),
        "mlx": verdicts.mlx_version(),
        "system": verdicts.system(),
        "chip": verdicts.chip(),
        "evidence": EVIDENCE,
        "operations": [_operation(operation, known, usable) for operation in operations().values()],
    }


def _operation(operation: Operation, known: Mapping[str, Verdict], usable: bool) -> dict[str, Any]:
    prefix = verdicts.verdict_key(operation, {})
    mine = {
        key.removeprefix(prefix).strip(): found
        for key, found in known.items()
        if key.startswith(prefix)
    }
    if not usable:
        status = "twin (no Metal device here)" if dispatch.mode() != "off" else "twin (mode off)"
    elif dispatch.mode() == "force":
        status = "kernel (mode force)"
    elif not mine:
        status = "not checked yet"
    else:
        enabled = sum(found.enabled for found in mine.values())
        status = f"kernel for {enabled} of {len(mine)} shapes"
    return {
        "name": operation.name,
        "version": operation.version,
        "status": status,
        "verdicts": [
            {"shape": shape, "age": age(found.when), **asdict(found)}
            for shape, found in mine.items()
        ],
    }


def age(when: float) -> str:
    """How long ago a time in seconds since 1970 was, such as "3 hours ago"."""
    seconds = max(0.0, time.time() - when)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
