"""JSON schemas of requests: brought to one draft, checked once, and judged by jsonschema.

Every schema that is one is taken, from draft 4 to 2020-12 and OpenAPI's `nullable`; keywords that
nobody knows are ignored, as the standard says. What could keep the server busy is bounded: nothing
is fetched, patterns have a time limit, and references may not multiply.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

import jsonschema
import referencing
import regex

from mlx_dgemma.constraints.keywords import is_multiple
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.keyword_shapes import well_formed

_MAX_DEPTH = 64
MOST_SCHEMAS = 20_000  # of a request: checking each takes a sixth of a millisecond
_MOST_WORK = 20_000  # subschemas that one value may have to be held against
_MOST_LINKED = 200  # references and the like that lead from one schema to the next
_PATTERN_SECONDS = 0.1
JUDGE_SECONDS = 4.0  # to judge one value
_PLAIN = re.compile(r"[^%~]*")  # a reference that every reader follows in the same way
_MOST_REPEATS = 10_000  # of a pattern's counted repeats, multiplied
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    *("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)
# Keywords that hold further schemas against the same value.
_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")


class UnjudgedError(Exception):
    """Nothing was found out about a value, and why."""


class _Clock(threading.local):
    deadline = float("inf")  # of this thread's own time: other work must not count


_clock = _Clock()


class Rules:
    """A schema, ready to judge values; ApiError 400 says why it is none.

    where: the request's field that holds it. root: the schema in draft 2020-12. size: schemas in
    it, at most `most`.
    """

    def __init__(self, schema: Any, where: str, most: int = MOST_SCHEMAS) -> None:
        self.where = where
        self.size, self._most = 0, most
        self._read: dict[int, Any] = {}  # by what stood there, which was read already or is now
        self._targets: dict[int, Any] = {}  # of the references, by the schemas that hold them
        self.root = self._modern(schema, where, 0)
        self._follow()
        work: dict[int, int] = {}
        for one in self._every():
            self._work(one, work, ())
        self._judge = _Judge(self.root, format_checker=_FORMATS, registry=referencing.Registry())

    def violation(self, value: Any) -> str | None:
        """How a JSON value breaks the schema, in a few words; None when it does not.

        Raises UnjudgedError for what cannot be judged, or not in time."""
        _clock.deadline = time.thread_time() + JUDGE_SECONDS
        try:
            error = jsonschema.exceptions.best_match(self._judge.iter_errors(value))
        except (RecursionError, OverflowError) as why:
            raise UnjudgedError("it is nested too deeply, or its numbers are too large") from why
        return None if error is None else f"{error.json_path}: {_short(error.message)}"

    def refuse(self, where: str, why: str) -> ApiError:
        return ApiError(400, f"{where} is no JSON schema to answer in: {why}.", param=self.where)

    def _follow(self) -> None:
        """Finds what every reference points at, and reads it where it was not read as a schema.

        Such a target, and one whose reference is written in an odd way, gets a place under
        `$defs`, so that whoever follows the reference later finds the same.
        """
        taken = self.root.get("$defs", {}) if isinstance(self.root, dict) else {}
        free = (name for i in itertools.count() if (name := f"target-{i}") not in taken)
        places: dict[int, str] = {}
        moved: dict[str, Any] = {}
        for schema in self._every():
            reference = schema.get("$ref")
            if reference is None:
                continue
            found = self._found(reference)
            target = self._read.get(id(found))
            if target is None:
                target = self._modern(found, f"{self.where}{_short(reference)[1:]}", 0)
                self._read[id(found)] = target
            self._targets[id(schema)] = target
            if target is not found or not _PLAIN.fullmatch(reference):
                if id(target) not in places:
                    places[id(target)] = name = next(free)
                    moved[name] = target
                schema["$ref"] = f"#/$defs/{places[id(target)]}"
        if moved:
            self.root["$defs"] = {**taken, **moved}

    def _every(self) -> Iterator[dict[str, Any]]:
        """Every schema that a value may be held against; references are followed on the way."""
        seen, waiting = set(), [self.root]
        while waiting:
            schema = waiting.pop()
            if isinstance(schema, dict) and id(schema) not in seen:
                seen.add(id(schema))
                yield schema
                waiting += [inner for _, inner in _subschemas(schema)]
                waiting.append(self._targets.get(id(schema)))

    def _found(self, reference: str) -> Any:
        """What stands where a reference into the schema points."""
        found = self.root
        if reference != "#" and not reference.startswith("#/"):
            raise self.refuse(self.where, f"{_short(reference)!r} points at nothing inside it")
        for written in reference.split("/")[1:]:
            plain, step = (_unescaped(text) for text in (written, unquote(written)))
            if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, Mapping) and (step in found or plain in found):
                found = found[step] if step in found else found[plain]
            else:
                raise self.refuse(self.where, f"{_short(reference)!r} points at nothing inside it")
        return found

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
        if not well_formed(modern):
            self._complain(modern, where)
        self._read[id(modern)] = modern
        return modern

    def _complain(self, schema: Mapping[str, Any], where: str) -> None:
        """Refuses a schema whose keywords are malformed, in jsonschema's words."""
        alone = {name: _emptied(name, inner) for name, inner in schema.items()}
        try:
            _META.validate(alone)
        except jsonschema.ValidationError as error:
            path = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in error.absolute_path)
            raise self.refuse(where + path, _short(error.message)) from None

    def _work(self, schema: Any, known: dict[int, int], inside: tuple[int, ...]) -> int:
        """How many schemas one value is held against at once; refuses loops and explosions."""
        if not isinstance(schema, Mapping):
            return 1
        if id(schema) in inside:
            raise self.refuse(self.where, "it refers to itself without end")
        if len(inside) > _MOST_LINKED:
            raise self.refuse(self.where, f"one value must pass {_MOST_LINKED} schemas in a row")
        if id(schema) not in known:
            here = (*inside, id(schema))
            held = [inner for name, inner in _subschemas(schema) if name in _IN_PLACE]
            if id(schema) in self._targets:
                held.append(self._targets[id(schema)])
            work = 1 + sum(self._work(inner, known, here) for inner in held)
            if work > _MOST_WORK:
                raise self.refuse(self.where, "its references multiply")
            known[id(schema)] = work
        return known[id(schema)]


def _unescaped(step: str) -> str:
    return step.replace("~1", "/").replace("~0", "~")


def _emptied(name: str, inner: Any) -> Any:
    """A keyword's value with nothing in its schemas, which were looked at themselves."""
    if name in _MAPS and isinstance(inner, Mapping):
        return {key: isinstance(value, Mapping) or value for key, value in inner.items()}
    if name in _LISTS and isinstance(inner, list):
        return [isinstance(value, Mapping) or value for value in inner]
    return name in _SINGLE or inner


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


def count_schemas(schema: Any) -> int:
    """Schemas in this one, about; counted until there are more than a request may hold."""
    count, waiting = 0, [schema]
    while waiting and count <= MOST_SCHEMAS:
        one = waiting.pop()
        if isinstance(one, Mapping):
            count += 1
            for name, inner in one.items():
                named = name in _MAPS and isinstance(inner, Mapping)
                waiting += inner.values() if named else (inner,)
        elif isinstance(one, list):
            waiting += one
    return count


def _short(message: str) -> str:
    return message if len(message) <= 200 else f"{message[:197]}..."


def _look_at_the_clock() -> None:
    if time.thread_time() > _clock.deadline:
        raise UnjudgedError(f"that takes longer than {JUDGE_SECONDS:g} s")


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
            _look_at_the_clock()
            if _compiled(pattern) is not None and matches(pattern, name):
                yield from judge.descend(inner, schema, path=name, schema_path=pattern)


def _additional_properties(
    judge: Any, rule: Any, value: Any, schema: Mapping[str, Any]
) -> Iterator[jsonschema.ValidationError]:
    patterns = schema.get("patternProperties", {})
    for name, inner in value.items() if isinstance(value, dict) else ():
        _look_at_the_clock()
        if name in schema.get("properties", {}) or any(matches(p, name) for p in patterns):
            continue
        if rule is False:
            yield jsonschema.ValidationError(f"{name!r} is not among its properties")
        else:
            yield from judge.descend(inner, rule, path=name)


def _multiple_of(_: Any, step: Any, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """Exactly, for 0.7 is a multiple of 0.1 as they are written, and none as binary fractions."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not is_multiple(Decimal(repr(value)), Decimal(repr(step))):
        yield jsonschema.ValidationError(f"{value!r} is not a multiple of {step!r}")


def _timed(keyword: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*given: Any) -> Any:
        _look_at_the_clock()
        return keyword(*given)

    return timed


_KEYWORDS = {
    **jsonschema.Draft202012Validator.VALIDATORS,
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "multipleOf": _multiple_of,
}
_Judge: Callable[..., Any] = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, {name: _timed(known) for name, known in _KEYWORDS.items()}
)
_META = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
_FORMATS = jsonschema.FormatChecker()


def _is_instant(value: Any) -> bool:
    """RFC 3339: a date, a time and an offset."""
    if not isinstance(value, str):
        return True
    return "T" in value.upper() and datetime.fromisoformat(value).tzinfo is not None


_FORMATS.checks("date-time", raises=ValueError)(_is_instant)
