"""Reading JSON files so that every complaint about them names file, key and value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_dgemma.errors import CheckpointError

_REQUIRED = object()


class Section:
    """One JSON object of a file."""

    def __init__(self, values: Any, source: str, prefix: str = ""):
        self.source, self.prefix = source, prefix
        if not isinstance(values, Mapping):
            where = f"{prefix.rstrip('.')} in {source}" if prefix else source
            raise CheckpointError(f"{where} must be a JSON object, not {values!r}.")
        self.values = values

    def refuse(self, key: str, why: str) -> CheckpointError:
        value = json.dumps(self.values.get(key), default=str)
        return CheckpointError(f"{self.source}: {self.prefix}{key} = {value} {why}.")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def section(self, key: str) -> Section:
        return Section(self.values.get(key), self.source, f"{self.prefix}{key}.")

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(key, f"must be an integer of at least {minimum}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, minimum: float = 0.0) -> float:
        value = self._present(key, default)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not minimum <= value < float("inf"):
            raise self.refuse(key, f"must be a number of at least {minimum:g}")
        return float(value)

    def positive(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.number(key, default)
        if value == 0.0:
            raise self.refuse(key, "must be greater than 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value

    def only(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """The value, if it is one this runtime supports."""
        value = self.get(key, default)
        if value not in allowed:
            names = " or ".join(json.dumps(v) for v in allowed)
            raise self.refuse(key, f"is not supported; this runtime serves {names}")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty when the key is absent or null."""
        value = self.get(key, [])
        listed = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in listed):
            raise self.refuse(key, "must be a token id or a list of token ids")
        return tuple(listed)

    def _present(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise CheckpointError(f"{self.source}: {self.prefix}{key} is missing.")
        return default


def read_json(path: Path) -> Any:
    """Parse a JSON file; CheckpointError when it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again.") from error
