"""JSON schemas as text with holes, and the check of what came to stand in them.

What a schema fixes, braces, keys and punctuation, is pinned on the canvas; what it leaves open
is a hole. Required properties are written, in the schema's order, or all when none is required.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_dgemma.server.errors import ApiError

HOLE = "<hole>"
_MAX_DEPTH = 16
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_ANNOTATIONS = (
    *("title", "description", "default", "examples", "format", "deprecated", "readOnly"),
    *("writeOnly", "$schema", "$id", "$comment", "$defs", "definitions", "strict"),
)
_CHECKED = (
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items"),
    *("minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minLength", "maxLength", "anyOf", "oneOf", "$ref"),
)


def escape(text: str) -> str:
    """Text that holds no hole, whatever it spells."""
    return text.replace("<hole", "\\<hole")


class Schema:
    """A schema this server can pin; ApiError 400 names what it cannot. where: its field."""

    def __init__(self, schema: Any, where: str) -> None:
        self._root = schema
        self._where = where
        self.template = self._skeleton(schema, where, 0)
        if HOLE not in self.template.replace("\\<hole", ""):
            raise self._cannot(where, "leaves nothing open")

    def problem(self, text: str) -> str | None:
        """Why `text` does not satisfy the schema, in a few words; None when it does."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return "it is not valid JSON"
        return self._violation(value, self._root, "$")

    # The skeleton

    def _skeleton(self, schema: Any, where: str, depth: int) -> str:
        schema = self._checked(schema, where, depth)
        if "const" in schema:
            return escape(json.dumps(schema["const"], ensure_ascii=False))
        kind = schema.get("type")
        if kind == "object" and schema.get("properties"):
            properties = schema["properties"]
            names = [n for n in properties if n in schema.get("required", ())] or list(properties)
            members = []
            for name in names:
                inner = self._skeleton(properties[name], f"{where}.properties.{name}", depth + 1)
                members.append(f"{escape(json.dumps(name, ensure_ascii=False))}: {inner}")
            return "{" + ", ".join(members) + "}"
        if kind == "object":
            return "{" + HOLE + "}"
        if kind == "array":
            self._skeleton(schema.get("items", {}), f"{where}.items", depth + 1)
            return "[" + HOLE + "]"
        if kind == "string" or (
            "enum" in schema and all(isinstance(v, str) for v in schema["enum"])
        ):
            return f'"{HOLE}"'
        return "null" if kind == "null" else HOLE

    def _checked(self, schema: Any, where: str, depth: int) -> Mapping[str, Any]:
        if depth > _MAX_DEPTH:
            raise self._cannot(where, f"is nested more than {_MAX_DEPTH} levels deep")
        if not isinstance(schema, Mapping):
            raise self._cannot(where, "is not an object")
        unknown = [key for key in schema if key not in _ANNOTATIONS + _CHECKED]
        if unknown:
            raise self._cannot(where, f"uses {unknown[0]!r}")
        if "$ref" in schema:
            return self._checked(self._resolved(schema, where), where, depth + 1)
        self._check_shapes(schema, where)
        for name in ("anyOf", "oneOf"):
            for i, option in enumerate(schema.get(name, ())):
                self._skeleton(option, f"{where}.{name}[{i}]", depth + 1)
        return schema

    def _check_shapes(self, schema: Mapping[str, Any], where: str) -> None:
        kinds = schema.get("type", [])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        shapes: dict[str, Any] = {
            "type": all(kind in _TYPES for kind in kinds),
            "enum": isinstance(schema.get("enum", [0]), list) and schema.get("enum", [0]),
            "properties": isinstance(schema.get("properties", {}), Mapping),
            "required": _is_list_of(schema.get("required", []), str),
            "additionalProperties": isinstance(schema.get("additionalProperties", True), bool),
        }
        for name in ("anyOf", "oneOf"):
            shapes[name] = isinstance(schema.get(name, [0]), list) and schema.get(name, [0])
        for name in ("minItems", "maxItems", "minLength", "maxLength"):
            shapes[name] = type(schema.get(name, 0)) is int
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            shapes[name] = type(schema.get(name, 0)) in (int, float)
        for name, sound in shapes.items():
            if not sound:
                raise self._cannot(where, f"has a {name!r} it cannot use")
        missing = [n for n in schema.get("required", ()) if n not in schema.get("properties", {})]
        if missing:
            raise self._cannot(where, f"requires {missing[0]!r} without describing it")

    def _resolved(self, schema: Mapping[str, Any], where: str) -> Any:
        """What a reference inside the same schema points at."""
        target, reference = self._root, schema["$ref"]
        steps = reference.split("/") if isinstance(reference, str) else [""]
        for step in steps[1:]:
            target = target.get(step) if isinstance(target, Mapping) else None
        if steps[0] != "#" or target is None:
            raise self._cannot(where, f"refers to {reference!r}, which is not in it")
        return target

    def _cannot(self, where: str, why: str) -> ApiError:
        return ApiError(400, f"{where} {why}: this server cannot pin it.", param=self._where)

    # The check

    def _violation(self, value: Any, schema: Any, at: str) -> str | None:
        if "$ref" in schema:
            return self._violation(value, self._resolved(schema, at), at)
        if "const" in schema and not _equal(value, schema["const"]):
            return f"{at} is not the constant"
        if "enum" in schema and not any(_equal(value, option) for option in schema["enum"]):
            return f"{at} is none of the enum's values"
        kinds = schema.get("type", [])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if kinds and not any(_is(value, kind) for kind in kinds):
            return f"{at} is not of type {' or '.join(kinds)}"
        for name, wanted in (("anyOf", range(1, 10**6)), ("oneOf", range(1, 2))):
            if name in schema:
                fitting = [s for s in schema[name] if self._violation(value, s, at) is None]
                if len(fitting) not in wanted:
                    return f"{at} fits {len(fitting)} of the options of {name}"
        if isinstance(value, dict):
            return self._in_object(value, schema, at)
        if isinstance(value, list):
            return self._in_array(value, schema, at)
        return _out_of_bounds(value, schema, at)

    def _in_object(self, value: dict[str, Any], schema: Any, at: str) -> str | None:
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{at} has no {name!r}"
        for name, inner in value.items():
            if name not in properties:
                if schema.get("additionalProperties", True) is False:
                    return f"{at} has an additional {name!r}"
                continue
            problem = self._violation(inner, properties[name], f"{at}.{name}")
            if problem:
                return problem
        return None

    def _in_array(self, value: list[Any], schema: Any, at: str) -> str | None:
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{at} has {len(value)} items"
        for i, inner in enumerate(value):
            problem = self._violation(inner, schema.get("items", {}), f"{at}[{i}]")
            if problem:
                return problem
        return None


def _out_of_bounds(value: Any, schema: Any, at: str) -> str | None:
    if isinstance(value, str):
        low, high = schema.get("minLength", 0), schema.get("maxLength", len(value))
        return None if low <= len(value) <= high else f"{at} has {len(value)} characters"
    if isinstance(value, int | float) and not isinstance(value, bool):
        inside = (
            value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )
        return None if inside else f"{at} is out of bounds"
    return None


def _is(value: Any, kind: str) -> bool:
    if kind == "integer":
        return (
            not isinstance(value, bool) and isinstance(value, int | float) and value == int(value)
        )
    if kind == "number":
        return not isinstance(value, bool) and isinstance(value, int | float)
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, types[kind])


def _equal(value: Any, wanted: Any) -> bool:
    """JSON's equality: true is not 1."""
    return type(value) is type(wanted) and bool(value == wanted)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(inner, kind) for inner in value)
