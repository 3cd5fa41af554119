"""JSON schemas of requests: brought to one draft, checked once, and judged by jsonschema.

Every schema that is one is taken, from draft 4 to 2020-12 and OpenAPI's `nullable`; keywords that
nobody knows are ignored, as the standard says. What could keep the server busy is bounded: nothing
is fetched, patterns have a time limit, and references may not multiply.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

import jsonschema
import referencing
import regex

from mlx_dgemma.server.errors import ApiError

_MAX_DEPTH = 64
MOST_SCHEMAS = 20_000  # of a request: checking each takes a sixth of a millisecond
_MOST_WORK = 20_000  # subschemas that one value may have to be held against
_PATTERN_SECONDS = 0.1
_MOST_REPEATS = 10_000  # of a pattern's counted repeats, multiplied
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    *("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
# Keywords that hold further schemas against the same value.
_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")


class Rules:
    """A schema, ready to judge values; ApiError 400 says why it is none.

    where: the request's field that holds it. root: the schema in draft 2020-12. size: schemas in
    it, at most `most`.
    """

    def __init__(self, schema: Any, where: str, most: int = MOST_SCHEMAS) -> None:
        self.where = where
        self.size, self._most = 0, most
        self.root = self._modern(schema, where, 0)
        try:
            jsonschema.Draft202012Validator(_METASCHEMA).validate(self.root)
        except jsonschema.ValidationError as error:
            path = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in error.absolute_path)
            raise self.refuse(where + path, _short(error.message)) from None
        except RecursionError:
            raise self.refuse(where, "it is nested too deeply") from None
        self._work(self.root, {}, ())
        self._judge = _Judge(self.root, format_checker=_FORMATS, registry=referencing.Registry())

    def violation(self, value: Any) -> str | None:
        """How a JSON value breaks the schema, in a few words; None when it does not."""
        try:
            error = jsonschema.exceptions.best_match(self._judge.iter_errors(value))
        except (RecursionError, OverflowError):
            return None  # beyond what can be judged
        return None if error is None else f"{error.json_path}: {_short(error.message)}"

    def refuse(self, where: str, why: str) -> ApiError:
        return ApiError(400, f"{where} is no JSON schema to answer in: {why}.", param=self.where)

    def target(self, reference: Any, where: str) -> Any:
        """What a reference inside the schema points at."""
        target = self.root
        inside = isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
        for step in reference.split("/")[1:] if inside else [""]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and step.isdecimal() and int(step) < len(target):
                target = target[int(step)]
            elif isinstance(target, Mapping) and step in target:
                target = target[step]
            elif inside or step == "":
                raise self.refuse(where, f"{reference!r} points at nothing inside it")
        return target

    def _modern(self, schema: Any, where: str, depth: int) -> Any:
        """The schema in draft 2020-12, the older spellings rewritten."""
        self.size += 1
        if depth > _MAX_DEPTH or self.size > self._most:
            raise self.refuse(
                where, f"it is nested more than {_MAX_DEPTH} levels deep or too large"
            )
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise self.refuse(where, "a schema is an object")
        modern = {str(k): v for k, v in schema.items() if k not in ("$schema", "$id", "id")}
        _rewrite(modern)
        for name, inner in list(modern.items()):
            at = f"{where}.{name}"
            if name in _MAPS and isinstance(inner, Mapping):
                modern[name] = {
                    k: self._modern(v, f"{at}.{k}", depth + 1) for k, v in inner.items()
                }
            elif name in _LISTS and isinstance(inner, list):
                modern[name] = [
                    self._modern(v, f"{at}[{i}]", depth + 1) for i, v in enumerate(inner)
                ]
            elif name in _SINGLE:
                modern[name] = self._modern(inner, at, depth + 1)
        return modern

    def _work(self, schema: Any, known: dict[int, int], inside: tuple[int, ...]) -> int:
        """How many schemas one value may be held against; refuses loops and explosions."""
        if not isinstance(schema, Mapping):
            return 1
        if id(schema) in inside:
            raise self.refuse(self.where, "it refers to itself without end")
        if id(schema) not in known:
            known[id(schema)] = 0  # further down, under properties and items, it may come again
            here = (*inside, id(schema))
            work = 1
            if "$ref" in schema:
                work += self._work(self.target(schema["$ref"], self.where), known, here)
            for name, inner in _subschemas(schema):
                place = name in _IN_PLACE
                cost = self._work(inner, known, here if place else ())
                work += cost if place else 0
            if work > _MOST_WORK:
                raise self.refuse(self.where, "its references multiply")
            known[id(schema)] = work
        return known[id(schema)]


def _rewrite(schema: dict[str, Any]) -> None:
    """Older drafts' and OpenAPI's keywords in the words of 2020-12, in place."""
    if isinstance(schema.get("items"), list):
        schema["prefixItems"] = schema.pop("items")
        if "additionalItems" in schema:
            schema["items"] = schema.pop("additionalItems")
    for bound, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(bound), bool) and schema.pop(bound) and limit in schema:
            schema[bound] = schema.pop(limit)
    for name in ("$dynamicRef", "$recursiveRef"):  # only differ across documents
        if name in schema:
            schema.setdefault("$ref", schema.pop(name))
    needs = schema.pop("dependencies", None)
    for name, need in needs.items() if isinstance(needs, Mapping) else ():
        keyword = "dependentRequired" if isinstance(need, list) else "dependentSchemas"
        schema.setdefault(keyword, {})[name] = need
    if schema.pop("nullable", False) is True:
        if isinstance(schema.get("type"), str):
            schema["type"] = [schema["type"], "null"]
            if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
                schema["enum"] = [*schema["enum"], None]
        elif "type" not in schema and schema:
            inner = dict(schema)
            names = [name for name in ("$defs", "definitions") if name in inner]
            definitions: dict[str, Any] = {name: inner.pop(name) for name in names}
            schema.clear()
            schema.update(definitions, anyOf=[inner, {"type": "null"}])


def _subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _MAPS:
        yield from ((name, inner) for inner in schema.get(name, {}).values())
    for name in _LISTS:
        yield from ((name, inner) for inner in schema.get(name, ()))
    for name in _SINGLE:
        if name in schema:
            yield name, schema[name]


def _short(message: str) -> str:
    return message if len(message) <= 200 else f"{message[:197]}..."


# Patterns


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> regex.Pattern[str] | None:
    """The pattern, or None for one that cannot be read, or that would take long to."""
    counts = re.findall(r"\{(\d*),?(\d*)\}", pattern)
    repeats = 1
    for low, high in counts:
        repeats *= max(int(high or low or 1), 1)
    if len(pattern) > 2000 or repeats > _MOST_REPEATS:
        return None
    try:
        return regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError):
        return None


def matches(pattern: str, text: str) -> bool:
    """Whether the pattern is in the text; True where that cannot be found out in time."""
    compiled = _compiled(pattern)
    if compiled is None:
        return True
    try:
        return compiled.search(text, timeout=_PATTERN_SECONDS) is not None
    except TimeoutError:
        return True


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and not matches(pattern, value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(
    judge: Any, patterns: Mapping[str, Any], value: Any, _: Any
) -> Iterator[jsonschema.ValidationError]:
    for pattern, schema in patterns.items() if isinstance(value, dict) else ():
        for name, inner in value.items():
            if _compiled(pattern) is not None and matches(pattern, name):
                yield from judge.descend(inner, schema, path=name, schema_path=pattern)


def _additional_properties(
    judge: Any, rule: Any, value: Any, schema: Mapping[str, Any]
) -> Iterator[jsonschema.ValidationError]:
    patterns = schema.get("patternProperties", {})
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name in schema.get("properties", {}) or any(matches(p, name) for p in patterns):
            continue
        if rule is False:
            yield jsonschema.ValidationError(f"{name!r} is not among its properties")
        else:
            yield from judge.descend(inner, rule, path=name)


def _multiple_of(_: Any, step: Any, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """Exactly, for 0.7 is a multiple of 0.1 as they are written, and none as binary fractions."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        exact, unit = (Fraction(Decimal(repr(number))) for number in (value, step))
        if (exact / unit).denominator != 1:
            yield jsonschema.ValidationError(f"{value!r} is not a multiple of {step!r}")


_Judge: Callable[..., Any] = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "multipleOf": _multiple_of,
    },
)
_METASCHEMA = jsonschema.Draft202012Validator.META_SCHEMA
_FORMATS = jsonschema.FormatChecker()


def _is_instant(value: Any) -> bool:
    """RFC 3339: a date, a time and an offset."""
    if not isinstance(value, str):
        return True
    return "T" in value.upper() and datetime.fromisoformat(value).tzinfo is not None


_FORMATS.checks("date-time", raises=ValueError)(_is_instant)
