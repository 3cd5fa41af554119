"""Reads the fields of a JSON object; every complaint names the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_dgemma.decoding.settings import Setting
from mlx_dgemma.server.errors import ApiError


class Fields:
    """One object of a request. Fields absent or null give None; `unread` lists the rest.

    hold: counts bytes that are kept until the request is over.
    """

    def __init__(
        self, body: Any, where: str = "", hold: Callable[[int], None] = lambda _: None
    ) -> None:
        if not isinstance(body, Mapping):
            name = where or "the body"
            raise ApiError(400, f"{name} must be a JSON object.", param=where or None)
        self.body = body
        self.hold = hold
        self._where = where
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def raw(self, name: str) -> Any:
        self._read.add(name)
        return self.body.get(name)

    def fail(self, name: str, expected: str) -> ApiError:
        path = self.path(name)
        return ApiError(400, f"{path} must be {expected}.", param=path)

    def text(self, name: str, choices: Sequence[str] = ()) -> str | None:
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.fail(name, "a string")
        if choices and value not in choices:
            raise self.fail(name, f"one of {', '.join(choices)}")
        return value

    def integer(self, name: str, low: int, high: int = 2**63 - 1) -> int | None:
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            bound = f"at least {low}" if high == 2**63 - 1 else f"from {low} to {high}"
            raise self.fail(name, f"a whole number {bound}")
        return value

    def limit(self, name: str) -> int | None:
        """A number of tokens; -1 asks for no limit."""
        if self.raw(name) == -1:
            return None
        return self.integer(name, 1)

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, "a number")
        if not low <= value <= high:
            raise self.fail(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def setting(self, name: str, known: Setting) -> Any:
        """A decoding setting, within what a request may ask of it."""
        bounds = known.request or ()
        if known.kind is str:
            return self.text(name, bounds)
        return (self.integer if known.kind is int else self.number)(name, *bounds)

    def flag(self, name: str) -> bool | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def items(self, name: str) -> list[Any] | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, list):
            raise self.fail(name, "a list")
        return value

    def strings(self, name: str, most: int) -> list[str]:
        """A string, or a list of strings; empty ones are left out."""
        value = self.raw(name)
        if value is None:
            return []
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(s, str) for s in found):
            raise self.fail(name, "a string or a list of strings")
        found = [string for string in found if string]
        if len(found) > most:
            raise self.fail(name, f"a list of at most {most} strings")
        return found

    def object(self, name: str) -> Fields | None:
        value = self.raw(name)
        return None if value is None else Fields(value, self.path(name))

    def unread(self) -> list[str]:
        """Fields that were not read, in the request's order."""
        return [str(name) for name, value in self.body.items() if name not in self._read
                and value is not None]  # fmt: skip
