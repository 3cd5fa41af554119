"""JSON schemas as text with holes, and the check of what came to stand in them.

What a schema fixes, braces, keys and punctuation, is pinned on the canvas; what it leaves open
is a hole, which may take just the enum's values, or digits, where the schema says so. Required
properties are written, in the schema's order, or all when none is required.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from mlx_dgemma.prompt.holes import Hole
from mlx_dgemma.server.patterns import parse_pattern
from mlx_dgemma.server.validation import Rules

Parts = list[str | Hole]
_DIGITS = 10  # tokens of a number, at most
_MOST_ITEMS = 64  # of an array that is written out
_NUMBERS = {"integer": r"[-\d]+", "number": r"[-+.eE\d]+"}


class Schema(Rules):
    """A schema this server can pin; ApiError 400 names what it cannot. where: its field.

    parts: literals and holes by turns, as `infill` takes them.
    """

    def __init__(self, schema: Any, where: str) -> None:
        super().__init__(schema, where)
        self.parts = _joined(self._skeleton(schema, where))
        if len(self.parts) == 1:
            raise self.refuse(where, "leaves nothing open")

    def problem(self, text: str) -> str | None:
        """Why `text` does not satisfy the schema, in a few words; None when it does."""
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return "it is not valid JSON"
        return self.violation(value)

    def _skeleton(self, schema: Any, where: str) -> Parts:
        if schema is True:
            return [Hole()]
        schema = self.plain(schema, where)
        values = self._values(schema, where)
        if values is not None:
            return _one_of(values)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = kind[0] if len(kind) == 1 else None
        if kind == "object":
            return self._object(schema, where)
        if kind == "array":
            return self._array(schema, where)
        if kind == "string":
            inside = parse_pattern(schema["pattern"]) if "pattern" in schema else [Hole()]
            assert inside is not None  # the rules were checked
            return ['"', *(_dumped(p)[1:-1] if isinstance(p, str) else p for p in inside), '"']
        if kind in _NUMBERS:
            return [Hole(1, _DIGITS, alphabet=_NUMBERS[kind])]
        return ["null"] if kind == "null" else [Hole()]

    def _values(self, schema: dict[str, Any], where: str) -> list[Any] | None:
        """Everything the value can be, where the schema lists it."""
        if "const" in schema:
            return [schema["const"]]
        if "enum" in schema:
            return list(schema["enum"])
        if schema.get("type") == "boolean":
            return [True, False]
        for name in ("anyOf", "oneOf"):
            if name in schema:
                listed = [self._values(self.plain(s, where), where) for s in schema[name]
                          if s is not True]  # fmt: skip
                if len(listed) == len(schema[name]) and None not in listed:
                    return [value for values in listed for value in values or ()]
        return None

    def _object(self, schema: dict[str, Any], where: str) -> Parts:
        properties = schema.get("properties", {})
        missing = [name for name in schema.get("required", ()) if name not in properties]
        if missing:
            raise self.refuse(where, f"requires {missing[0]!r} without describing it")
        if not properties:
            return ["{", Hole(), "}"]
        names = [n for n in properties if n in schema.get("required", ())] or list(properties)
        members = []
        for name in names:
            inner = self._skeleton(properties[name], f"{where}.properties.{name}")
            members.append([f"{_dumped(name)}: ", *inner])
        return ["{", *_separated(members), "}"]

    def _array(self, schema: dict[str, Any], where: str) -> Parts:
        first = schema.get("prefixItems", [])
        count = schema.get("minItems", 0)
        # So many and no more, either by number or because no rule is left for another.
        if count != schema.get("maxItems"):
            if not first or schema.get("items", True) is not False:
                return ["[", Hole(), "]"]
            count = len(first)
        if not 1 <= count <= _MOST_ITEMS:
            return ["[", "]"] if count == 0 else ["[", Hole(), "]"]
        rules = [*first, *[schema.get("items", True)] * count][:count]
        if any(rule is False for rule in rules):
            raise self.refuse(where, "asks for more items than it describes")
        return ["[", *_separated([self._skeleton(rule, where) for rule in rules]), "]"]


def _one_of(values: list[Any]) -> Parts:
    written = list(dict.fromkeys(map(_dumped, values)))
    if len(written) == 1:
        return [written[0]]
    if all(isinstance(value, str) and value for value in values):
        return ['"', Hole(choices=tuple(text[1:-1] for text in written)), '"']
    return [Hole(choices=tuple(written))]


def _separated(members: Iterable[Parts]) -> Parts:
    parts: Parts = []
    for member in members:
        parts += [", ", *member] if parts else member
    return parts


def _joined(parts: Parts) -> Parts:
    """Literals and holes by turns, a literal (maybe empty) first and last."""
    joined: Parts = [""]
    for part in parts:
        if isinstance(part, str):
            joined[-1] = f"{joined[-1]}{part}"
        else:
            joined += [part, ""]
    return joined


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
