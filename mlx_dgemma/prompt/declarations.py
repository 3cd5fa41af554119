"""JSON schemas of tool parameters in the small language that chat templates render.

A template writes a property's description, one type, a string's enum, `nullable`, an object's
properties and an array's items. References, unions, constants and tuples are brought to that:
what cannot be said in it is said in the description.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_DEPTH = 16
_MAX_LINKED = 64  # references that lead from one to the next
_MAX_SCHEMAS = 2000  # references followed; what comes after keeps its type alone


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with everything a template would render as garbage, or not at all, rewritten.

    A schema that is in the small language already stays as it is.
    """
    plain = _Plain(parameters).schema(parameters, 0)
    return {**plain, "type": "object"} if plain.get("type") != "object" else plain


class _Plain:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._inside: list[str] = []  # references being followed
        self._seen = 0

    def schema(self, schema: Any, depth: int) -> dict[str, Any]:
        if not isinstance(schema, Mapping):
            return {"type": "string", "description": "any JSON value"}
        outside = len(self._inside)
        plain = self._without_references(schema)
        for name in ("anyOf", "oneOf"):
            options = plain.pop(name, None)
            if isinstance(options, list) and options and depth < _MAX_DEPTH:
                plain = self._union(plain, options, depth)
        plain = _with_one_type(_with_enum(plain))
        if depth >= _MAX_DEPTH or self._seen > _MAX_SCHEMAS:
            plain = {k: v for k, v in plain.items() if k in ("type", "description", "nullable")}
        elif plain["type"] == "object":
            plain = self._object(plain, depth)
        elif plain["type"] == "array":
            plain = self._array(plain, depth)
        del self._inside[outside:]
        return plain

    def _without_references(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """The schema with its references and allOf merged in; a recursive one, or a long
        chain of them, is cut short."""
        self._seen += 1
        plain = {k: v for k, v in schema.items() if k not in ("$defs", "definitions", "$schema")}
        parts = plain.pop("allOf", None)
        parts = list(parts) if isinstance(parts, list) else []
        reference = plain.pop("$ref", None)
        if isinstance(reference, str):
            target = self._target(reference)
            around = reference in self._inside or len(self._inside) > _MAX_LINKED
            if around and isinstance(target, Mapping):
                return {"type": target.get("type", "object"), **plain}
            self._inside.append(reference)
            parts.append(target)
        for part in parts:
            if isinstance(part, Mapping) and self._seen <= _MAX_SCHEMAS:
                plain = _merged(self._without_references(part), plain)
        return plain

    def _target(self, reference: str) -> Any:
        target: Any = self._root
        for step in reference.lstrip("#").split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, Mapping) else None
        return target

    def _union(self, plain: dict[str, Any], options: list[Any], depth: int) -> dict[str, Any]:
        """One schema for any of several: the null option is a flag, objects share their keys."""
        read = [self.schema(option, depth + 1) for option in options if isinstance(option, Mapping)]
        rest = [option for option in read if option.get("type") != "null"]
        if len(rest) < len(read):
            plain["nullable"] = True
        if not rest:
            return _merged({"type": "null"}, plain)
        if len(rest) == 1:
            return _merged(rest[0], plain)
        kinds = list(dict.fromkeys(option["type"] for option in rest))
        enums = [option.get("enum") for option in rest]
        if kinds == ["string"] and None not in enums:
            values = [value for enum in enums for value in enum or ()]
            return _merged({"type": "string", "enum": list(dict.fromkeys(values))}, plain)
        union: dict[str, Any] = {"type": kinds[0]}
        if kinds == ["object"]:
            required = [set(option.get("required") or ()) for option in rest]
            union["properties"] = {}
            for option in rest:
                for name, inner in (option.get("properties") or {}).items():
                    known = union["properties"].get(name)
                    both = inner if known is None or known == inner else _both(known, inner)
                    union["properties"][name] = both
            common = set.intersection(*required)
            union["required"] = [n for n in union["properties"] if n in common]
        described = [option.get("description") or _said(option) for option in rest]
        return _described(_merged(union, plain), "one of: " + "; ".join(described))

    def _object(self, plain: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = plain.get("properties")
        named = properties if isinstance(properties, Mapping) else {}
        plain["properties"] = {k: self.schema(inner, depth + 1) for k, inner in named.items()}
        values = plain.pop("additionalProperties", None)
        if not named and isinstance(values, Mapping) and values:
            kind = self.schema(values, depth + 1)
            plain = _described(plain, f"any keys; each value: {_said(kind)}")
        return plain

    def _array(self, plain: dict[str, Any], depth: int) -> dict[str, Any]:
        items, first = plain.get("items"), plain.pop("prefixItems", None)
        if isinstance(items, list):
            first, items = items, None
        if isinstance(first, list) and first:
            said = [_said(self.schema(item, depth + 1)) for item in first]
            plain = _described(plain, "in this order: " + ", ".join(said))
        if isinstance(items, Mapping) and items:
            plain["items"] = self.schema(items, depth + 1)
        else:
            plain.pop("items", None)
        return plain


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both schemas' keywords; properties and required are joined."""
    merged = {**under, **over}
    for name in ("properties", "required"):
        if name in under and name in over:
            ours, theirs = over[name], under[name]
            if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
                merged[name] = {**theirs, **ours}
            elif isinstance(ours, list) and isinstance(theirs, list):
                merged[name] = list(dict.fromkeys([*theirs, *ours]))
    return merged


def _with_enum(plain: dict[str, Any]) -> dict[str, Any]:
    if "const" in plain:
        plain["enum"] = [plain.pop("const")]
    enum = plain.get("enum")
    if not isinstance(enum, list):
        return plain
    values = [value for value in enum if value is not None]
    if len(values) < len(enum):
        plain["nullable"] = True
    if all(isinstance(value, str) for value in values):
        return {"type": "string", **plain, "enum": values}
    # Templates write the enums of strings alone.
    del plain["enum"]
    plain.setdefault("type", _kind(values[0]))
    return _described(
        plain, "one of " + ", ".join(json.dumps(v, ensure_ascii=False) for v in values)
    )


def _with_one_type(plain: dict[str, Any]) -> dict[str, Any]:
    kinds = plain.get("type")
    if isinstance(kinds, str):
        return plain
    listed = [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, list) else []
    if "null" in listed and len(listed) > 1:
        plain["nullable"] = True
        listed.remove("null")
    if len(listed) > 1:
        plain = _described(plain, " or ".join(listed))
    if listed:
        plain["type"] = listed[0]
    elif "properties" in plain or "additionalProperties" in plain:
        plain["type"] = "object"
    elif "items" in plain or "prefixItems" in plain:
        plain["type"] = "array"
    else:
        plain["type"] = "string"
        plain.setdefault("description", "any JSON value")
    return plain


def _both(known: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """A property that two options of a union describe differently."""
    enums = [schema.get("enum") for schema in (known, inner)]
    if None not in enums:
        return {**known, "enum": list(dict.fromkeys(v for enum in enums for v in enum or ()))}
    return _described(dict(known), f"or {_said(inner)}")


def _described(plain: dict[str, Any], more: str) -> dict[str, Any]:
    before = plain.get("description")
    return {**plain, "description": f"{before} ({more})" if before else more}


def _said(plain: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    kind = str(plain.get("type", "any value"))
    enum, properties = plain.get("enum"), plain.get("properties")
    if isinstance(enum, Sequence):
        return " or ".join(json.dumps(value, ensure_ascii=False) for value in enum)
    if isinstance(properties, Mapping) and properties:
        return f"{kind} with {', '.join(map(str, properties))}"
    return kind


def _kind(value: Any) -> str:
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (list, "array"))
    return next((name for type_, name in kinds if isinstance(value, type_)), "object")
