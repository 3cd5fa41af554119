"""Whether the keywords of one JSON schema have values of their shapes, as draft 2020-12 says.

jsonschema holds a schema against the metaschema, which is exact, and takes a sixth of a millisecond
for each schema inside it. A request may hold thousands, so it is asked only where this check fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
_ANCHOR = re.compile(r"[A-Za-z_][-A-Za-z0-9._]*")
_TYPES = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))


def well_formed(schema: Mapping[str, Any]) -> bool:
    """Whether every keyword's value has its shape; inner schemas are not looked into."""
    return all(_CHECKS[name](value) for name, value in schema.items() if name in _CHECKS)


def _of(*types: type) -> Check:
    return lambda value: isinstance(value, types)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value >= 0


def _names(value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return texts and len(set(value)) == len(value)


def _type(value: Any) -> bool:
    if isinstance(value, str):
        return value in _TYPES
    return bool(value) and _names(value) and _TYPES.issuperset(value)


def _anchor(value: Any) -> bool:
    return isinstance(value, str) and _ANCHOR.fullmatch(value) is not None


def _values(check: Check) -> Check:
    return lambda value: isinstance(value, Mapping) and all(map(check, value.values()))


def _schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_schema, value))


_text, _flag, _schema = _of(str), _of(bool), _of(Mapping, bool)
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("$ref", "$dynamicRef", "$recursiveRef", "$comment"), _text),
    **dict.fromkeys(("$anchor", "$dynamicAnchor", "$recursiveAnchor"), _anchor),
    **dict.fromkeys(("title", "description", "format", "pattern"), _text),
    **dict.fromkeys(("contentEncoding", "contentMediaType"), _text),
    **dict.fromkeys(("deprecated", "readOnly", "writeOnly", "uniqueItems"), _flag),
    **dict.fromkeys(("enum", "examples"), _of(list)),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _number),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _count),
    **dict.fromkeys(("minProperties", "maxProperties", "minContains", "maxContains"), _count),
    **dict.fromkeys(("properties", "patternProperties", "dependentSchemas"), _values(_schema)),
    **dict.fromkeys(("$defs", "definitions"), _values(_schema)),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), _schemas),
    **dict.fromkeys(("items", "contains", "additionalProperties", "propertyNames"), _schema),
    **dict.fromkeys(("not", "if", "then", "else", "contentSchema"), _schema),
    **dict.fromkeys(("unevaluatedItems", "unevaluatedProperties"), _schema),
    "$vocabulary": _values(_flag),
    "dependentRequired": _values(_names),
    "multipleOf": lambda value: _number(value) and value > 0,
    "required": _names,
    "type": _type,
}
