"""Reads the fields of a JSON object; every complaint names the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_dgemma.server.accepted import Accepts, Kind, Known
from mlx_dgemma.server.errors import ApiError


class Fields:
    """One object of a request. Fields absent or null give None; `unread` lists the rest.

    known: the object's fields; None for an object that may have any, whose values are checked by
    their type alone. hold: counts bytes that are kept until the request is over.
    """

    def __init__(
        self,
        body: Any,
        where: str = "",
        known: Known | None = None,
        hold: Callable[[int], None] = lambda _: None,
    ) -> None:
        if not isinstance(body, Mapping):
            name = where or "the body"
            raise ApiError(400, f"{name} must be a JSON object.", param=where or None)
        self.body = body
        self.hold = hold
        self._where = where
        self._known = known
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def raw(self, name: str) -> Any:
        assert self._known is None or name in self._known, f"no record of {self.path(name)}"
        self._read.add(name)
        return self.body.get(name)

    def fail(self, name: str, expected: str) -> ApiError:
        path = self.path(name)
        return ApiError(400, f"{path} must be {expected}.", param=path)

    def value(self, name: str) -> Any:
        """The value of a known field, whatever its kind."""
        assert self._known is not None
        kind = self._known[name].kind
        return getattr(self, _METHODS.get(kind, kind))(name)

    def text(self, name: str, choices: Sequence[str] = ()) -> str | None:
        """choices: for an object without records."""
        value, accepts = self._get(name, "text")
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.fail(name, "a string")
        choices = choices or accepts.choices
        if choices and value not in choices:
            raise self.fail(name, f"one of {', '.join(choices)}")
        return value

    def integer(self, name: str) -> int | None:
        value, accepts = self._get(name, "integer")
        return None if value is None else self._whole(name, value, accepts)

    def limit(self, name: str) -> int | None:
        """A number of tokens; -1 asks for no limit."""
        value, accepts = self._get(name, "limit")
        return None if value is None or value == -1 else self._whole(name, value, accepts)

    def number(self, name: str) -> float | None:
        value, accepts = self._get(name, "number")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, "a number")
        if not accepts.low <= value <= accepts.high:
            raise self.fail(name, accepts.expected)
        return float(value)

    def flag(self, name: str) -> bool | None:
        value, accepts = self._get(name, "flag")
        if value is not None and not isinstance(value, bool):
            raise self.fail(name, accepts.expected)
        return value

    def items(self, name: str) -> list[Any] | None:
        value, accepts = self._get(name, "list")
        if value is not None and not isinstance(value, list):
            raise self.fail(name, accepts.expected)
        return value

    def strings(self, name: str) -> list[str]:
        """A string, or a list of strings; empty ones are left out."""
        value, accepts = self._get(name, "strings")
        if value is None:
            return []
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(s, str) for s in found):
            raise self.fail(name, "a string or a list of strings")
        found = [string for string in found if string]
        if len(found) > accepts.most:
            raise self.fail(name, accepts.expected)
        return found

    def object(self, name: str) -> Fields | None:
        value, accepts = self._get(name, "object")
        return None if value is None else Fields(value, self.path(name), accepts.inside)

    def unread(self) -> list[str]:
        """Fields that were not read, in the request's order."""
        return [str(name) for name, value in self.body.items() if name not in self._read
                and value is not None]  # fmt: skip

    def _get(self, name: str, kind: Kind) -> tuple[Any, Accepts]:
        value = self.raw(name)
        accepts = Accepts(kind) if self._known is None else self._known[name]
        assert accepts.kind == kind, f"{self.path(name)} is read as {kind}"
        if value is None and accepts.required:
            raise self.fail(name, f"given as {accepts.expected}")
        return value, accepts

    def _whole(self, name: str, value: Any, accepts: Accepts) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, accepts.expected)
        if not accepts.low <= value <= accepts.high:
            raise self.fail(name, accepts.expected)
        return value


_METHODS = {"any": "raw", "list": "items"}  # the others have the name of their kind
