"""The one form of every report that people may send: a JSON object with a schema, a version, what
kind it is, and the machine it is about. It names no user, no path and no prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_dgemma._version import __version__
from mlx_dgemma.errors import InputError
from mlx_dgemma.files import read_bytes, write_text
from mlx_dgemma.machine.hardware import Machine, conditions, machine
from mlx_dgemma.untrusted_json import Limits, UntrustedJSONError, parse

SCHEMA, VERSION = "mlx_dgemma.report", 1
# What makes them: doctor; benchmark plain, with --quality, --count and --compare; evaluate;
# studies/quality.py.
KINDS = ("doctor", "times", "quality", "count", "comparison", "evaluation", "presets", "guards")
_LIMITS = Limits(size=256 << 20, parts=20_000_000)  # every question of large tasks


def report(kind: str, this: Machine | None = None, **content: Any) -> dict[str, Any]:
    """A report of this machine, as it is now."""
    assert kind in KINDS
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "kind": kind,
        "mlx_dgemma": __version__,
        "machine": (this or machine()).record(),
        "conditions": conditions().record(),
        **content,
    }


def write_report(path: str | Path, found: dict[str, Any]) -> None:
    """Writes a report whole or not at all; raises what `files.write_text` does."""
    write_text(path, json.dumps(found, indent=2) + "\n")


def read_report(path: str | Path, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """A report from a file; InputError for anything else, and for one of another kind."""
    try:
        found = parse(read_bytes(path, _LIMITS.size), _LIMITS)
    except (OSError, UntrustedJSONError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it {error}"
        raise InputError(f"{path} cannot be read as a report: {why}.") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise InputError(f"{path} is no report: its schema is not {SCHEMA!r}.")
    if found.get("version") != VERSION:
        raise InputError(
            f"{path} has version {found.get('version')!r} of a report, and this program reads "
            f"{VERSION}: use the program's release that wrote it."
        )
    if found.get("kind") not in kinds:
        raise InputError(
            f"{path} is a report of {found.get('kind')!r}; one of {', '.join(kinds)} is needed."
        )
    for name in ("machine", "conditions"):
        if not isinstance(found.get(name), dict):
            raise InputError(f"{path} is no whole report: it has no {name}.")
    return found
