"""One object of a JSON file, whose values are read by type and range.

Every complaint names file, key and value. Numbers are bounded, so that no count read here can
make a loop endless, an allocation huge, or a later conversion overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.untrusted_json import printable, shown

_REQUIRED = object()
MOST_INTEGER = 2**31 - 1
MOST_NUMBER = 1e30


class Section:
    """One JSON object of a file."""

    def __init__(self, values: Any, source: str, prefix: str = ""):
        self.source, self.prefix = source, prefix
        if not isinstance(values, Mapping):
            where = f"{printable(prefix.rstrip('.'))} in {source}" if prefix else source
            raise CheckpointError(f"{where} must be a JSON object, not {shown(values)}.")
        self.values = values

    def refuse(self, key: str, why: str) -> CheckpointError:
        name = printable(f"{self.prefix}{key}")
        return CheckpointError(f"{self.source}: {name} = {shown(self.values.get(key))} {why}.")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def section(self, key: str) -> Section:
        return Section(self.values.get(key), self.source, f"{self.prefix}{key}.")

    def integer(
        self, key: str, default: Any = _REQUIRED, minimum: int = 1, maximum: int = MOST_INTEGER
    ) -> int:
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(key, f"must be an integer of at least {minimum}")
        if value > maximum:
            raise self.refuse(key, f"must be at most {maximum:,}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, minimum: float = 0.0) -> float:
        value = self._present(key, default)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not minimum <= value <= MOST_NUMBER:
            raise self.refuse(key, f"must be a number from {minimum:g} to {MOST_NUMBER:g}")
        return float(value)

    def positive(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.number(key, default)
        if value < 1e-30:
            raise self.refuse(key, "must be greater than 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string, or the default where the key is absent or null."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self.refuse(key, "must be a string")
        return value

    def only(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """The value, if it is one this runtime supports."""
        value = self.get(key, default)
        if value not in allowed:
            names = " or ".join(shown(v) for v in allowed)
            raise self.refuse(key, f"is not supported; this runtime serves {names}")
        return allowed[allowed.index(value)]  # the same number in the type that is expected

    def ids(self, key: str, most: int = 1024) -> tuple[int, ...]:
        """One token id or a list of them; empty when the key is absent or null."""
        value = self.get(key, [])
        listed = value if isinstance(value, list | tuple) else [value]
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in listed)
        if not whole or len(listed) > most or not all(0 <= i <= MOST_INTEGER for i in listed):
            raise self.refuse(key, f"must be a token id or a list of at most {most:,} token ids")
        return tuple(listed)

    def _present(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            name = printable(f"{self.prefix}{key}")
            raise CheckpointError(f"{self.source}: {name} is missing.")
        return default
