"""What single keywords of a JSON schema say: counts, bounds, types, options that lie apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from mlx_dgemma.errors import LanguageError

CHECKED_LATER = (
    *("uniqueItems", "contains", "minContains", "dependentRequired", "dependentSchemas"),
    *("dependencies", "if"),
)
UNEVALUATED = {"unevaluatedProperties": "additionalProperties", "unevaluatedItems": "items"}
# What decides beside its own keywords which members and items are evaluated.
EVALUATING = frozenset(("anyOf", "oneOf", "if", "dependentSchemas", "contains"))
OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
MEANINGFUL = frozenset(
    (*UNEVALUATED, "type", "enum", "const", "anyOf", "oneOf", "not", "nullable", *CHECKED_LATER)
) | {name for names in OF_TYPE.values() for name in names} | {
    *("minProperties", "maxProperties", "propertyNames", "additionalItems"),
}  # fmt: skip
_NUMBER = "a number"
# The keywords of whose values the shape matters, the types of these, and their name.
_SHAPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("properties", "patternProperties"), ((Mapping,), "an object")),
    **dict.fromkeys(("prefixItems", "required", "enum"), ((list,), "a list")),
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), ((list,), "a list of schemas")),
    **dict.fromkeys(("minimum", "maximum"), ((int, float, type(None)), _NUMBER)),
    **dict.fromkeys(("minLength", "maxLength"), ((int, float, type(None)), _NUMBER)),
    **dict.fromkeys(("minItems", "maxItems"), ((int, float, type(None)), _NUMBER)),
    **dict.fromkeys(("minProperties", "maxProperties"), ((int, float, type(None)), _NUMBER)),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), ((int, float, type(None)), _NUMBER)),
    "not": ((Mapping, bool, type(None)), "a schema"),
}


def check_shapes(schema: Mapping[str, Any]) -> None:
    """LanguageError for a keyword whose value is of no use."""
    if not all(isinstance(name, str) for name in schema):
        raise LanguageError("A schema has a name that is no text.")
    for name, (types, form) in _SHAPES.items():
        if name in schema and not isinstance(schema[name], types):
            raise LanguageError(f"{name} is {schema[name]!r:.40}: use {form}.")
    for name in schema.get("required", ()):
        if not isinstance(name, str):
            raise LanguageError(f"required lists {name!r:.40}: use names of properties.")


def count(schema: Mapping[str, Any], name: str) -> int | None:
    value = schema.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not is_of_type(value, "integer") or value < 0:
        raise LanguageError(f"{name} is {value!r:.40}: use a whole number from 0 on.")
    return int(value)


def decimal(value: Any, name: str) -> Decimal:
    if not is_of_type(value, "number") or value in (math.inf, -math.inf) or value != value:
        raise LanguageError(f"{name} is {value!r:.40}: use a number.")
    found = Decimal(repr(value))
    if name == "multipleOf" and found <= 0:
        raise LanguageError("multipleOf is not above zero: use a positive number.")
    return found


def bounds(schema: Mapping[str, Any], scale: int) -> tuple[Decimal | None, Decimal | None]:
    """Inclusive bounds among the multiples of 1/scale."""
    step = Decimal(1) / scale
    low = high = None
    if schema.get("minimum") is not None:
        low = decimal(schema["minimum"], "minimum")
    if schema.get("maximum") is not None:
        high = decimal(schema["maximum"], "maximum")
    least, most = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if least is True:  # draft 4
        least, low = low, None
    if most is True:
        most, high = high, None
    if least is not None and least is not False:  # 0 is a bound
        value = decimal(float(least) if isinstance(least, Decimal) else least, "exclusiveMinimum")
        above = (math.floor(value * scale) + 1) * step
        low = above if low is None else max(low, above)
    if most is not None and most is not False:
        value = decimal(float(most) if isinstance(most, Decimal) else most, "exclusiveMaximum")
        below = (math.ceil(value * scale) - 1) * step
        high = below if high is None else min(high, below)
    return low, high


def apart(options: list[Any], resolve: Callable[[Any], Any]) -> bool:
    """Whether no value fits two options: other types, or a property with other constants."""
    plain = []
    for option in options:
        if isinstance(option, Mapping) and "$ref" in option:
            option = resolve(option["$ref"])
        if not isinstance(option, Mapping):
            return False
        plain.append(option)
    kinds = [option.get("type") for option in plain]
    if all(isinstance(kind, str) for kind in kinds) and len(set(map(str, kinds))) == len(kinds):
        return not {"integer", "number"} <= set(map(str, kinds))
    constants = [_constants(option) for option in plain]
    names = set.intersection(*map(set, constants)) if constants else set()
    for name in names:
        values = [repr(value) for each in constants for value in each[name]]
        if len(values) == len(set(values)):
            return True
    alone = [option.get("enum", [option["const"]] if "const" in option else None)
             for option in plain]  # fmt: skip
    values = [repr(value) for each in alone for value in each or [None]]
    return None not in alone and len(values) == len(set(values))


def _constants(option: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Required properties that may only hold listed values."""
    found = {}
    for name in option.get("required", ()):
        inner = option.get("properties", {}).get(name)
        if isinstance(inner, Mapping) and ("const" in inner or "enum" in inner):
            found[name] = inner["enum"] if "enum" in inner else [inner["const"]]
    return found


def is_between(low: Decimal | None, high: Decimal | None, places: int) -> bool:
    """Whether a number of so many decimal places lies within inclusive bounds."""
    if low is None or high is None:
        return True
    scale = Fraction(10**places)
    return math.ceil(Fraction(low) * scale) <= math.floor(Fraction(high) * scale)


def identity(value: Any) -> Any:
    """What equal JSON values have in common: 1 is 1.0, and true is no number."""
    if isinstance(value, Mapping):
        return frozenset((name, identity(inner)) for name, inner in value.items())
    if isinstance(value, list):
        return tuple(map(identity, value))
    return (type(value) is bool, value)


def fits(number: float, schema: Mapping[str, Any]) -> bool:
    """Whether a number is within the bounds of a schema, and a multiple."""
    value = decimal(number, "enum")
    low, high, least, most = (
        None if schema.get(name) is None or isinstance(schema[name], bool)
        else decimal(schema[name], name)
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    )  # fmt: skip
    if schema.get("exclusiveMinimum") is True:  # draft 4
        least = low
    if schema.get("exclusiveMaximum") is True:
        most = high
    step = schema.get("multipleOf")
    return (
        (low is None or low <= value)
        and (high is None or value <= high)
        and (least is None or least < value)
        and (most is None or value < most)
        and (step is None or is_multiple(value, decimal(step, "multipleOf")))
    )


def is_multiple(value: Decimal, step: Decimal) -> bool:
    """Whether a number is a whole number of steps, exactly."""
    return (Fraction(value) / Fraction(step)).denominator == 1


def is_of_type(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or isinstance(value, int) or value.is_integer())
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, types[kind])


def listed_values(schema: Any) -> list[Any] | None:
    """The values that a schema lists; None where it says something else."""
    if not isinstance(schema, Mapping) or len(MEANINGFUL & schema.keys()) != 1:
        return None
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None
