"""JSON schemas as this server understands them: the keywords, how they merge, what breaks them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.patterns import matches, parse_pattern

_MAX_DEPTH = 16
_MAX_SIZE = 4096  # subschemas, references followed
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_ANNOTATIONS = (
    *("title", "description", "default", "examples", "format", "deprecated", "readOnly"),
    *("writeOnly", "$schema", "$id", "$comment", "$defs", "definitions", "strict"),
)
_LENGTHS = ("minItems", "maxItems", "minLength", "maxLength")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_CHECKED = (
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items"),
    *("prefixItems", "uniqueItems", "multipleOf", "pattern", "allOf", "anyOf", "oneOf", "$ref"),
    *(_LENGTHS + _BOUNDS),
)
_OPTIONS = ("allOf", "anyOf", "oneOf")


class Rules:
    """A schema whose every keyword is understood; ApiError 400 names the first that is not.

    where: the request's field that holds it.
    """

    def __init__(self, schema: Any, where: str) -> None:
        self.root = schema
        self.where = where
        self._seen = 0
        self._check(schema, where, 0)

    def violation(self, value: Any) -> str | None:
        """How a JSON value breaks the schema, in a few words; None when it does not."""
        return self._violation(value, self.root, "$")

    def refuse(self, where: str, why: str) -> ApiError:
        return ApiError(400, f"{where} {why}: this server cannot pin it.", param=self.where)

    def plain(self, schema: Any, where: str) -> dict[str, Any]:
        """The schema with references followed and allOf merged into it."""
        plain = dict(schema)
        parts = list(plain.pop("allOf", ()))
        if "$ref" in plain:
            parts.append(self._resolved(plain, where))
            del plain["$ref"]
        for part in parts:
            if part is not True:
                plain = self._merged(plain, self.plain(part, where), where)
        return plain

    # Reading the schema

    def _check(self, schema: Any, where: str, depth: int) -> None:
        self._seen += 1
        if depth > _MAX_DEPTH or self._seen > _MAX_SIZE:
            raise self.refuse(where, f"is nested more than {_MAX_DEPTH} levels deep or too large")
        if schema is True:
            return
        if not isinstance(schema, Mapping):
            raise self.refuse(where, "is not an object")
        unknown = [key for key in schema if key not in _ANNOTATIONS + _CHECKED]
        if unknown:
            raise self.refuse(where, f"uses {unknown[0]!r}")
        self._check_shapes(schema, where)
        if "$ref" in schema:
            self._check(self._resolved(schema, where), where, depth + 1)
        for name, inner in _inner(schema):
            self._check(inner, f"{where}.{name}", depth + 1)

    def _check_shapes(self, schema: Mapping[str, Any], where: str) -> None:
        kinds = _kinds(schema)
        shapes: dict[str, Any] = {
            "type": all(kind in _TYPES for kind in kinds),
            "enum": isinstance(schema.get("enum", [0]), list) and schema.get("enum", [0]),
            "properties": isinstance(schema.get("properties", {}), Mapping),
            "required": _all_text(schema.get("required", [])),
            "prefixItems": isinstance(schema.get("prefixItems", []), list),
            "uniqueItems": isinstance(schema.get("uniqueItems", True), bool),
            "multipleOf": _is(schema.get("multipleOf", 1), "number")
            and schema.get("multipleOf", 1) > 0,
        }
        for name in _OPTIONS:
            shapes[name] = isinstance(schema.get(name, [0]), list) and schema.get(name, [0])
        for name in _LENGTHS:
            shapes[name] = type(schema.get(name, 0)) is int
        for name in _BOUNDS:
            shapes[name] = _is(schema.get(name, 0), "number")
        for name, sound in shapes.items():
            if not sound:
                raise self.refuse(where, f"has a {name!r} it cannot use")
        if "pattern" in schema and parse_pattern(schema["pattern"]) is None:
            raise self.refuse(
                where,
                "has a 'pattern' beyond literal text and character classes between ^ and $",
            )

    def _resolved(self, schema: Mapping[str, Any], where: str) -> Any:
        """What a reference inside the same schema points at."""
        target, reference = self.root, schema["$ref"]
        steps = reference.split("/") if isinstance(reference, str) else [""]
        for step in steps[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, Mapping) else None
        if steps[0] != "#" or target is None:
            raise self.refuse(where, f"refers to {reference!r}, which is not in it")
        return target

    def _merged(self, one: dict[str, Any], other: dict[str, Any], where: str) -> dict[str, Any]:
        """What satisfies both."""
        merged = {**other, **one}
        for key in one.keys() & other.keys() - set(_ANNOTATIONS):
            ours, theirs = one[key], other[key]
            if key == "properties":
                merged[key] = {**theirs, **ours}
                for name in ours.keys() & theirs.keys():
                    merged[key][name] = {"allOf": [ours[name], theirs[name]]}
            elif key == "required":
                merged[key] = list(dict.fromkeys([*ours, *theirs]))
            elif key == "type":
                merged[key] = _common_kinds(_kinds(one), _kinds(other))
            elif key == "enum":
                merged[key] = [value for value in ours if any(_equal(value, v) for v in theirs)]
            elif key == "items":
                merged[key] = {"allOf": [ours, theirs]}
            elif key.lower().startswith(("min", "exclusivemin")):
                merged[key] = max(ours, theirs)
            elif key.lower().startswith(("max", "exclusivemax")):
                merged[key] = min(ours, theirs)
            elif not _equal(ours, theirs):
                raise self.refuse(where, f"has two different {key!r} in its allOf")
            if merged[key] in ([], None):
                raise self.refuse(where, f"has an allOf that no {key!r} satisfies")
        for part in (one, other):
            closed = part.get("additionalProperties", True) is False
            if closed and merged.get("properties", {}).keys() - part.get("properties", {}).keys():
                raise self.refuse(where, "has an allOf that forbids what it asks for")
        return merged

    # Checking a value

    def _violation(self, value: Any, schema: Any, at: str) -> str | None:
        if schema is True:
            return None
        if "$ref" in schema:
            problem = self._violation(value, self._resolved(schema, at), at)
            if problem:
                return problem
        if "const" in schema and not _equal(value, schema["const"]):
            return f"{at} is not the constant"
        if "enum" in schema and not any(_equal(value, option) for option in schema["enum"]):
            return f"{at} is none of the enum's values"
        kinds = _kinds(schema)
        if kinds and not any(_is(value, kind) for kind in kinds):
            return f"{at} is not of type {' or '.join(kinds)}"
        for option in schema.get("allOf", ()):
            problem = self._violation(value, option, at)
            if problem:
                return problem
        for name, most in (("anyOf", math.inf), ("oneOf", 1)):
            if name in schema:
                fitting = [s for s in schema[name] if self._violation(value, s, at) is None]
                if not 1 <= len(fitting) <= most:
                    return f"{at} fits {len(fitting)} of the options of {name}"
        if isinstance(value, dict):
            return self._in_object(value, schema, at)
        if isinstance(value, list):
            return self._in_array(value, schema, at)
        return _text_or_number(value, schema, at)

    def _in_object(self, value: dict[str, Any], schema: Any, at: str) -> str | None:
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{at} has no {name!r}"
        others = schema.get("additionalProperties", True)
        for name, inner in value.items():
            if name not in properties and others is False:
                return f"{at} has an additional {name!r}"
            problem = self._violation(inner, properties.get(name, others), f"{at}.{name}")
            if problem:
                return problem
        return None

    def _in_array(self, value: list[Any], schema: Any, at: str) -> str | None:
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{at} has {len(value)} items"
        if schema.get("uniqueItems") and any(
            _equal(one, other) for i, one in enumerate(value) for other in value[:i]
        ):
            return f"{at} repeats an item"
        first = schema.get("prefixItems", [])
        others = schema.get("items", True)
        for i, inner in enumerate(value):
            rule = first[i] if i < len(first) else others
            if rule is False:
                return f"{at} has {len(value)} items"
            problem = self._violation(inner, rule, f"{at}[{i}]")
            if problem:
                return problem
        return None


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, subschema) of everything directly inside."""
    for name, inner in schema.get("properties", {}).items():
        yield f"properties.{name}", inner
    for name in ("prefixItems", *_OPTIONS):
        for i, inner in enumerate(schema.get(name, ())):
            yield f"{name}[{i}]", inner
    for name in ("items", "additionalProperties"):
        if schema.get(name, False) is not False:
            yield name, schema[name]


def _text_or_number(value: Any, schema: Any, at: str) -> str | None:
    if isinstance(value, str):
        low, high = schema.get("minLength", 0), schema.get("maxLength", len(value))
        if not low <= len(value) <= high:
            return f"{at} has {len(value)} characters"
        if "pattern" in schema and not matches(schema["pattern"], value):
            return f"{at} does not match its pattern"
    if isinstance(value, int | float) and not isinstance(value, bool):
        inside = (
            value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )
        if not inside:
            return f"{at} is out of bounds"
        step = schema.get("multipleOf")
        if step is not None and not _is_multiple(value, step):
            return f"{at} is no multiple of {step}"
    return None


def _kinds(schema: Mapping[str, Any]) -> list[Any]:
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _common_kinds(ours: list[str], theirs: list[str]) -> list[str]:
    """Types that are among both; an integer is a number."""
    wide = {"integer": ("integer", "number")}
    return [
        kind
        for kind in _TYPES
        if any(name in ours for name in wide.get(kind, (kind,)))
        and any(name in theirs for name in wide.get(kind, (kind,)))
        and not (kind == "number" and not ("number" in ours and "number" in theirs))
    ]


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or isinstance(value, int) or value.is_integer())
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, types[kind])


def _is_multiple(value: float, step: float) -> bool:
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    try:
        count = value / step
        return math.isclose(count, round(count), rel_tol=1e-9)
    except OverflowError:  # beyond what a float can hold
        return False


def _equal(value: Any, wanted: Any) -> bool:
    """JSON's equality: true is not 1."""
    return type(value) is type(wanted) and bool(value == wanted)


def _all_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(inner, str) for inner in value)
