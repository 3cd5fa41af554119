"""Schemas joined into one: allOf, and what stands beside a $ref."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_dgemma.constraints.keywords import check_shapes, identity
from mlx_dgemma.errors import LanguageError, UnsupportedError

_ANNOTATIONS = frozenset(
    (
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly"),
        *("writeOnly", "$schema", "$id", "$comment", "$anchor", "$defs", "definitions", "strict"),
        *("discriminator", "xml", "externalDocs"),
    )
)
_LARGER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties", "minContains")
_OF_ITEMS = frozenset(("items", "prefixItems", "additionalItems"))
_MOST_OPTIONS = 2_000  # of two lists, each with each
_SMALLER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


class Patterns(tuple[str, ...]):
    """Patterns that all must be found in a text: the value of a joined `pattern`."""

    __slots__ = ()

    @classmethod
    def of(cls, value: Any) -> Patterns:
        return value if isinstance(value, cls) else cls((value,))


def merged(schemas: list[Any]) -> Any:
    """One schema for all of them; LanguageError names what cannot be joined."""
    result: dict[str, Any] = {}
    for schema in schemas:
        if schema is False:
            return False
        if schema is True:
            continue
        if not isinstance(schema, Mapping):
            raise LanguageError(f"A schema is an object or a boolean, not {schema!r:.40}.")
        check_shapes(schema)
        result = _pair(result, dict(schema))
        if result.get("enum") == [] != schema.get("enum"):
            return False
    return result


def _pair(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    one, other = _listed(one, other), _listed(other, one)
    result = {**other, **one}
    items = _items(one, other)
    for key in one.keys() & other.keys():
        ours, theirs = one[key], other[key]
        if key in _ANNOTATIONS or key.startswith("x-") or _are_same(ours, theirs):
            continue
        if items is None or key not in _OF_ITEMS:
            result[key] = _both(key, ours, theirs)
    if items is not None:
        result = {**{k: v for k, v in result.items() if k not in _OF_ITEMS}, **items}
    for schema, against in ((one, other), (other, one)):
        _close(schema, against, result)
    return result


def _close(schema: dict[str, Any], against: dict[str, Any], result: dict[str, Any]) -> None:
    """Holds the members that only `against` knows to what `schema` says of others."""
    extra = schema.get("additionalProperties", True)
    if extra is True or extra == {}:
        return
    own, known = schema.get("patternProperties", {}), schema.get("properties", {})
    fresh = [name for name in against.get("properties", {}) if name not in known]
    if "patternProperties" in against or (own and fresh):
        if extra is not False:
            _no("additionalProperties")
        names = [{"enum": list(known)}] if known else []
        rule = {"anyOf": [*names, *({"pattern": one} for one in own)]} if names or own else False
        before = result.get("propertyNames", True)
        result["propertyNames"] = rule if before is True else {"allOf": [before, rule]}
        return
    for name in fresh:
        inner = result["properties"][name]
        held = False if extra is False else {"allOf": [inner, extra]}
        result["properties"] = {**result["properties"], name: held}


def _items(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """What both say of an array's items, place by place; None where no place has a rule of its
    own, or one says nothing."""
    if not any(isinstance(s.get("prefixItems", s.get("items")), list) for s in (one, other)):
        return None
    if not all(_OF_ITEMS & s.keys() for s in (one, other)):
        return None
    (first, rest), (second, more) = map(_places, (one, other))
    count = max(len(first), len(second))
    pairs = zip(
        [*first, *[rest] * (count - len(first))],
        [*second, *[more] * (count - len(second))],
        strict=True,
    )
    return {"prefixItems": [_joined(a, b) for a, b in pairs], "items": _joined(rest, more)}


def _places(schema: dict[str, Any]) -> tuple[list[Any], Any]:
    """The rules of the first items, and that of the others."""
    items = schema.get("items", True)
    if isinstance(items, list):  # before 2020-12
        return items, schema.get("additionalItems", True)
    return schema.get("prefixItems", []), items


def _joined(ours: Any, theirs: Any) -> Any:
    if False in (ours, theirs):
        return False
    if ours is True or theirs is True:
        return theirs if ours is True else ours
    return {"allOf": [ours, theirs]}


def _listed(schema: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    """A constant as a list of one, where both name values."""
    if "const" not in schema or not {"const", "enum"} & beside.keys():
        return schema
    values = [schema["const"]]
    if isinstance(listed := schema.get("enum"), list):
        values = _common(values, listed)
    return {**{k: v for k, v in schema.items() if k != "const"}, "enum": values}


def _are_same(ours: Any, theirs: Any) -> bool:
    return bool(ours == theirs) and identity(ours) == identity(theirs)


def _common(ours: list[Any], theirs: list[Any]) -> list[Any]:
    known = set(map(identity, theirs))
    return [value for value in ours if identity(value) in known]


def _both(key: str, ours: Any, theirs: Any) -> Any:
    if key == "properties":
        return {
            name: {"allOf": [ours[name], theirs[name]]}
            if name in ours and name in theirs
            else ours.get(name, theirs.get(name))
            for name in {**ours, **theirs}
        }
    if key == "required":
        return list(dict.fromkeys([*ours, *theirs]))
    if key == "type":
        return _types(ours, theirs)
    if key == "enum":
        return _common(ours, theirs)
    if None in (ours, theirs) and key in (*_LARGER, *_SMALLER):
        return theirs if ours is None else ours
    if key in _LARGER:
        return max(ours, theirs)
    if key in _SMALLER:
        return min(ours, theirs)
    if key == "multipleOf" and isinstance(ours, int) and isinstance(theirs, int):
        return math.lcm(ours, theirs)
    if key in ("items", "additionalProperties", "propertyNames"):
        return _joined(ours, theirs)
    if key == "pattern":
        return Patterns((*Patterns.of(ours), *Patterns.of(theirs)))
    if key in ("anyOf", "oneOf"):
        if len(ours) * len(theirs) > _MOST_OPTIONS:
            raise LanguageError(f"The schema joins too many options of {key}: write them as one.")
        return [{"allOf": [a, b]} for a in ours for b in theirs]
    return _no(key)


def _no(key: str) -> Any:
    raise UnsupportedError(f"The schema joins two different {key!r:.40}: write them as one.")


def _types(ours: Any, theirs: Any) -> Any:
    a = ours if isinstance(ours, list) else [ours]
    b = theirs if isinstance(theirs, list) else [theirs]
    common = [kind for kind in a if kind in b]
    if "integer" not in common and (
        ("integer" in a and "number" in b) or ("integer" in b and "number" in a)
    ):
        common.append("integer")
    return common if len(common) != 1 else common[0]
