"""JSON schemas as text with holes, and the check of what came to stand in them.

What a schema fixes, braces, keys and punctuation, is pinned on the canvas; what it leaves open
is a hole, which may take just the enum's values, or digits, where the schema says so. Required
properties are written, in the schema's order, or all when none is required. What is too involved
to pin is one hole: the check decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_dgemma.prompt.holes import Hole
from mlx_dgemma.server.patterns import parse_pattern
from mlx_dgemma.server.validation import Rules

Parts = list[str | Hole]
_DIGITS = 10  # tokens of a number, at most
_MOST_ITEMS = 64  # of an array that is written out
_MOST_PINNED = 512  # subschemas that are written out
_NUMBERS = {"integer": r"[-\d]+", "number": r"[-+.eE\d]+"}


class Schema(Rules):
    """A schema to answer in; ApiError 400 for what is none. where: its field.

    parts: literals and holes by turns, as `infill` takes them; a single literal when the schema
    leaves nothing open.
    """

    def __init__(self, schema: Any, where: str) -> None:
        super().__init__(schema, where)
        self._pinned = 0
        self.parts = _joined(self._skeleton(self.root, ()))

    def problem(self, text: str) -> str | None:
        """Why `text` does not satisfy the schema, in a few words; None when it does."""
        try:
            value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
        except _RepeatedKeyError as error:
            return f"it has the key {error.args[0]!r} twice"
        except (ValueError, RecursionError):
            return "it is not valid JSON"
        return self.violation(value)

    def _skeleton(self, schema: Any, inside: tuple[Any, ...]) -> Parts:
        self._pinned += 1
        if not isinstance(schema, Mapping) or self._pinned > _MOST_PINNED:
            return [Hole()]
        flat = self._flat(schema, inside)
        if flat is None:
            return [Hole()]
        schema, inside = flat
        values = self._values(schema, inside)
        if values:
            return _one_of(values)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = kind[0] if len(kind) == 1 else None
        if kind == "object":
            return self._object(schema, inside)
        if kind == "array":
            return self._array(schema, inside)
        if kind == "string":
            within = parse_pattern(schema["pattern"]) if "pattern" in schema else None
            written = [_dumped(p)[1:-1] if isinstance(p, str) else p for p in within or [Hole()]]
            return ['"', *written, '"']
        if kind in _NUMBERS:
            return [Hole(1, _DIGITS, alphabet=_NUMBERS[kind])]
        return ["null"] if kind == "null" else [Hole()]

    def _flat(
        self, schema: Mapping[str, Any], inside: tuple[Any, ...]
    ) -> tuple[dict[str, Any], tuple[Any, ...]] | None:
        """The schema with references and allOf in it, and what was followed; None in a loop."""
        flat = dict(schema)
        parts = list(flat.pop("allOf", ()))
        if "$ref" in flat:
            reference = flat.pop("$ref")
            if reference in inside:
                return None
            inside = (*inside, reference)
            parts.append(self.target(reference, self.where))
        for part in parts:
            inner = self._flat(part, inside) if isinstance(part, Mapping) else ({}, inside)
            if inner is None:
                return None
            flat, inside = _merged(flat, inner[0]), inner[1]
        return flat, inside

    def _values(self, schema: Mapping[str, Any], inside: tuple[Any, ...]) -> list[Any] | None:
        """Everything the value can be, where the schema lists it."""
        if "const" in schema:
            return [schema["const"]]
        if "enum" in schema:
            return list(schema["enum"])
        if schema.get("type") == "boolean":
            return [True, False]
        for name in ("anyOf", "oneOf"):
            listed: list[list[Any] | None] = []
            for option in schema.get(name, ()):
                flat = self._flat(option, inside) if isinstance(option, Mapping) else None
                listed.append(None if flat is None else self._values(*flat))
            if listed and None not in listed:
                return [value for values in listed for value in values or ()]
        return None

    def _object(self, schema: Mapping[str, Any], inside: tuple[Any, ...]) -> Parts:
        properties, required = schema.get("properties", {}), schema.get("required", ())
        names = list(dict.fromkeys([n for n in properties if n in required] + list(required)))
        names = names or list(properties)
        if not names:
            return ["{", Hole(), "}"]
        members = [
            [f"{_dumped(name)}: ", *self._skeleton(properties.get(name, True), inside)]
            for name in names
        ]
        return ["{", *_separated(members), "}"]

    def _array(self, schema: Mapping[str, Any], inside: tuple[Any, ...]) -> Parts:
        first = schema.get("prefixItems", [])
        count = schema.get("minItems", 0)
        # So many and no more, either by number or because no rule is left for another.
        if count != schema.get("maxItems"):
            if not first or schema.get("items", True) is not False:
                return ["[", Hole(), "]"]
            count = len(first)
        if not 1 <= count <= _MOST_ITEMS:
            return ["[", "]"] if count == 0 else ["[", Hole(), "]"]
        rules = [*first, *[schema.get("items", True)] * int(count)][: int(count)]
        return ["[", *_separated([self._skeleton(rule, inside) for rule in rules]), "]"]


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What both ask for, well enough to pin it: the check knows the whole truth."""
    merged = {**other, **one}
    if "properties" in one and "properties" in other:
        ours, theirs = one["properties"], other["properties"]
        both = {name: {"allOf": [ours[name], theirs[name]]} for name in ours.keys() & theirs.keys()}
        merged["properties"] = {**theirs, **ours, **both}
    if "required" in one and "required" in other:
        merged["required"] = list(dict.fromkeys([*one["required"], *other["required"]]))
    if "enum" in one and "enum" in other:
        merged["enum"] = [value for value in one["enum"] if value in other["enum"]]
    return merged


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


class _RepeatedKeyError(ValueError):
    """An object has a key twice; the key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise _RepeatedKeyError(key)
        members[key] = value
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
