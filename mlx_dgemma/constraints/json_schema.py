"""JSON Schema as a regular language over JSON's text.

Properties come in the schema's order, optional ones may be left out, names that the schema does not
list only come where it describes them. References may recurse DEPTH times. Annotations are ignored.

What a regular language cannot say is left to a check of the finished value, and `unchecked` names
it: uniqueItems, contains, dependencies, conditions, some `not` and `oneOf`, large multipleOf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from mlx_dgemma.constraints.expressions import UNBOUNDED, Node, Space
from mlx_dgemma.constraints.formats import FORMATS
from mlx_dgemma.constraints.json_text import MOST_DIVISOR, JsonText
from mlx_dgemma.constraints.keywords import (
    CHECKED_LATER,
    EVALUATING,
    MEANINGFUL,
    OF_TYPE,
    UNEVALUATED,
    apart,
    bounds,
    check_shapes,
    count,
    decimal,
    fits,
    identity,
    is_between,
    is_of_type,
    listed_values,
)
from mlx_dgemma.constraints.merging import Patterns, merged
from mlx_dgemma.constraints.object_members import ObjectMembers
from mlx_dgemma.constraints.shortest import NEVER, HardToFindError, shortest_length
from mlx_dgemma.errors import LanguageError, UnsupportedError

DEPTH = 5  # how often a reference may recurse
_MOST_NESTED = 60
_MOST_MERGES = 2_000
_MERGE = 20  # what joining two schemas counts
_PLACES = 6  # of a number with bounds
_FINEST = 20  # of one whose bounds are closer than that
_MOST_PLACES = 10  # of a multiple
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# The dynamic ones only differ across documents, of which there is one.
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_JOINING = frozenset((*_REFERENCES, "allOf"))
_OF_SCALARS = (OF_TYPE["string"], OF_TYPE["number"])


class SchemaLanguage:
    """Builds expressions of schemas that share one root.

    unchecked: the keywords that the language leaves to a check, where they stand. impossible: why
    parts of it have no text.
    """

    def __init__(self, space: Space, root: Any, text: JsonText | None = None) -> None:
        self.space = space
        self.text = text or JsonText(space)
        self.root = root
        self.unchecked: dict[str, None] = {}
        self.impossible: list[str] = []
        self._known: dict[tuple[int, int], Node] = {}
        self._open: frozenset[int] = frozenset()
        self._plained: dict[tuple[int, str], Any] = {}
        self._merges = 0
        self._level = 0
        self._members = ObjectMembers(
            space, self.text, self.unchecked, self.impossible, self._all_of
        )
        self._kinds: dict[str, Callable[[Mapping[str, Any], int], Node]] = {
            "object": self._members.expression,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
            "boolean": lambda schema, depth: self.text.constants([True, False]),
            "null": lambda schema, depth: self.text.constant(None),
        }

    def build(self) -> Node:
        return self._any(self.root, DEPTH)

    def _any(self, schema: Any, depth: int) -> Node:
        if schema is True or schema == {}:
            return self.text.value()
        if schema is False:
            return self.space.none
        if not isinstance(schema, Mapping):
            raise LanguageError(f"A schema is an object or a boolean, not {schema!r:.40}.")
        check_shapes(schema)
        opened = self._open | {id(schema)}
        if id(schema) in self._open:
            # The same schema inside itself: one level of recursion less is left.
            if depth == 0:
                return self.space.none
            depth, opened = depth - 1, frozenset((id(schema),))
        key = (id(schema), depth)
        if key not in self._known:
            if self._level > _MOST_NESTED * (DEPTH + 1):
                raise LanguageError(f"The schema nests more than {_MOST_NESTED} levels deep.")
            before, self._open = self._open, opened
            self._level += 1
            try:
                self._known[key] = self._described(schema, depth)
            finally:
                self._open = before
                self._level -= 1
        return self._known[key]

    def _described(self, schema: Mapping[str, Any], depth: int) -> Node:
        if _JOINING & schema.keys():
            return self._any(self._plain(schema), depth)
        for name in CHECKED_LATER:
            if schema.get(name) is not None and (name, schema[name]) != ("uniqueItems", False):
                self.unchecked[name] = None
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._options(schema, name, depth)
        if UNEVALUATED.keys() & schema.keys():
            key = (id(schema), "settled")
            if key not in self._plained:
                self._plained[key] = self._settled(schema)
            return self._any(self._plained[key], depth)
        if "const" in schema or "enum" in schema:
            node = self._enum(schema)
        else:
            kinds = self._types(schema)
            node = self.space.either(self._kinds[kind](schema, depth) for kind in kinds)
        return self._without(schema, node)

    def _settled(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """A schema into which all is joined: what is not evaluated is what else there is."""
        found = {name: rule for name, rule in schema.items() if name not in UNEVALUATED}
        for name, other in UNEVALUATED.items():
            if schema.get(name) is None:
                continue
            if EVALUATING & schema.keys():
                self.unchecked[name] = None
            elif other not in schema:
                found[other] = schema[name]
        return found

    def _plain(self, schema: Mapping[str, Any]) -> Any:
        """References followed and allOf merged; the same object for the same schema."""
        key = (id(schema), "plain")
        if key not in self._plained:
            siblings, parts = self._parts(schema)
            alone = len(parts) == 1 and not any(name in MEANINGFUL for name in siblings)
            self._plained[key] = parts[0] if alone else self._merged(siblings, parts)
        return self._plained[key]

    def _merged(self, schema: Any, parts: Sequence[Any]) -> Any:
        """One schema for what stands beside its parts, and these; what cannot be joined is left to
        the check."""
        result = schema
        for part in parts:
            try:
                result = merged([result, self._flat(part, 0)])
            except UnsupportedError:
                self.unchecked["allOf"] = None
            if isinstance(result, Mapping):
                self.space.charge(_MERGE + len(result) + len(result.get("properties", ())))
        return result

    def _flat(self, schema: Any, level: int) -> Any:
        """A part of another schema, without references and allOf of its own."""
        if not isinstance(schema, Mapping):
            return schema
        if _JOINING & schema.keys():
            self._merges += 1
            if level > _MOST_NESTED or self._merges > _MOST_MERGES:
                raise LanguageError(
                    "The schema's references go round in a circle, or join too much: describe a "
                    "value."
                )
            siblings, parts = self._parts(schema)
            schema = merged([siblings, *(self._flat(part, level + 1) for part in parts)])
        waits = isinstance(schema, Mapping) and UNEVALUATED.keys() & schema.keys()
        return self._settled(schema) if waits else schema

    def _parts(self, schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """What stands beside the references and allOf of a schema, and what these hold."""
        siblings = {k: v for k, v in schema.items() if k not in _JOINING}
        parts = [self.resolve(schema[name]) for name in _REFERENCES if name in schema]
        check_shapes(schema)
        return siblings, [*parts, *schema.get("allOf", [])]

    def resolve(self, reference: Any) -> Any:
        """What a reference inside the root points at."""
        if not isinstance(reference, str) or not (reference == "#" or reference[:2] == "#/"):
            raise LanguageError(
                f"The schema refers to {reference!r:.60}: only references into itself (#/...) "
                "can be followed; put it under $defs."
            )
        target: Any = self.root
        for step in reference.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and step.isdecimal() and int(step) < len(target):
                target = target[int(step)]
            elif isinstance(target, Mapping) and step in target:
                target = target[step]
            else:
                raise LanguageError(f"The schema refers to {reference!r:.60}, which it lacks.")
        return target

    def _types(self, schema: Mapping[str, Any]) -> list[str]:
        given = schema.get("type")
        kinds = given if isinstance(given, list) else [given]
        if given is None:
            kinds = [k for k, names in OF_TYPE.items() if any(n in schema for n in names)]
            kinds = kinds or [kind for kind in _TYPES if kind != "integer"]
        for kind in kinds:
            if kind not in _TYPES:
                raise LanguageError(f"The schema has a type {kind!r:.40}: use {', '.join(_TYPES)}.")
        if schema.get("nullable") is True and "null" not in kinds:  # OpenAPI 3.0
            kinds = [*kinds, "null"]
        unwanted = self._unwanted(schema)
        return [kind for kind in dict.fromkeys(kinds) if kind not in unwanted]

    def _unwanted(self, schema: Mapping[str, Any]) -> list[str]:
        """Types that a `not` takes out altogether."""
        inner = schema.get("not")
        if not isinstance(inner, Mapping) or MEANINGFUL & inner.keys() != {"type"}:
            return []
        kinds = inner["type"] if isinstance(inner["type"], list) else [inner["type"]]
        return [*kinds, "integer"] if "number" in kinds else kinds

    def _enum(self, schema: Mapping[str, Any]) -> Node:
        """The listed values that are all else that the schema asks for."""
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list) or not values:
            raise LanguageError("An enum is a list of at least one value.")
        if "const" in schema:
            wanted = identity(schema["const"])
            values = [value for value in values if identity(value) == wanted]
        kinds = self._types({"type": [*_TYPES], **schema})
        unwanted = set(map(identity, listed_values(schema.get("not")) or ()))
        fitting = [
            value
            for value in values
            if any(is_of_type(value, kind) for kind in kinds) and identity(value) not in unwanted
        ]
        if any(name in schema for name in (*OF_TYPE["string"], *OF_TYPE["number"])):
            text = self._content(schema)
            fitting = [value for value in fitting if self._is_right(value, schema, text)]
        asked = MEANINGFUL.difference(("type", "enum", "const", "nullable", "not"), *_OF_SCALARS)
        if asked & schema.keys() and any(isinstance(value, list | Mapping) for value in fitting):
            self.unchecked["enum"] = None
        return self.text.constants(fitting)

    def _is_right(self, value: Any, schema: Mapping[str, Any], text: Node) -> bool:
        if isinstance(value, str):
            return self.space.holds(text, self.text.spelled(value)[1:-1])
        return not is_of_type(value, "number") or fits(value, schema)

    def _options(self, schema: Mapping[str, Any], name: str, depth: int) -> Node:
        options = schema[name]
        if not isinstance(options, list) or not options:
            raise LanguageError(f"{name} is a list of at least one schema.")
        rest = {k: v for k, v in schema.items() if k != name}
        if name == "oneOf" and not apart(options, self.resolve):
            self.unchecked["oneOf"] = None
        if any(key in MEANINGFUL for key in rest):
            key = (id(schema), name)
            if key not in self._plained:
                joined = [self._merged(rest, [option]) for option in options]
                self._plained[key] = joined
            options = self._plained[key]
        parts = [self._any(option, depth) for option in options]
        if schema.get("nullable") is True:
            parts.append(self.text.constant(None))
        return self.space.either(parts)

    def _without(self, schema: Mapping[str, Any], node: Node) -> Node:
        unwanted = schema.get("not")
        if unwanted is None or unwanted is False:
            return node
        if unwanted is True or unwanted == {}:
            return self.space.none
        values = listed_values(unwanted)
        if values is not None and {"enum", "const"} & schema.keys():
            return node  # taken out already
        if values is not None and all(isinstance(v, str | bool | None) for v in values):
            return self.space.both([node, self.space.without(self.text.constants(values))])
        kinds = self._unwanted(schema)
        if not kinds or ("integer" in kinds and "number" not in kinds):
            self.unchecked["not"] = None
        return node

    # Kinds of values

    def _string(self, schema: Mapping[str, Any], depth: int) -> Node:
        return self.text.quoted(self._content(schema))

    def _content(self, schema: Mapping[str, Any]) -> Node:
        """What stands between the quotes of a string."""
        text, space = self.text, self.space
        conditions = []
        if "pattern" in schema:
            for pattern in Patterns.of(schema["pattern"]):
                try:
                    conditions.append(text.inside.search(pattern))
                except UnsupportedError:
                    self.unchecked["pattern"] = None
        if isinstance(name := schema.get("format"), str) and name in FORMATS:
            conditions = self._formatted(conditions, text.inside.full(FORMATS[name]))
        low, high = count(schema, "minLength") or 0, count(schema, "maxLength")
        if low or high is not None or not conditions:
            conditions.append(
                space.repeat(text.character, low, UNBOUNDED if high is None else high)
            )
        return space.both(conditions)

    def _formatted(self, patterns: list[Node], written: Node) -> list[Node]:
        """Patterns and a format together; the patterns alone where they leave nothing of what this
        writes of the format, which is not all that it allows."""
        if patterns:
            try:
                empty = shortest_length(self.space, self.space.both([*patterns, written])) >= NEVER
            except HardToFindError:
                empty = True
            if empty:
                self.unchecked["format"] = None
                return patterns
        return [*patterns, written]

    def _integer(self, schema: Mapping[str, Any], depth: int) -> Node:
        low, high = bounds(schema, 1)
        first = None if low is None else math.ceil(low)
        last = None if high is None else math.floor(high)
        return self.text.integer(first, last, self._divisors(schema, 0)[0])

    def _number(self, schema: Mapping[str, Any], depth: int) -> Node:
        if schema.get("multipleOf") is not None:
            step = decimal(schema["multipleOf"], "multipleOf")
            places = min(max(-int(step.normalize().as_tuple().exponent), 0), _MOST_PLACES)
            low, high = bounds(schema, 10**places)
            return self.text.number(low, high, self._divisors(schema, places))
        low, high = bounds(schema, 10**_PLACES)
        if low is None and high is None:
            return self.text.any_number
        places = _PLACES
        while places < _FINEST and not is_between(low, high, places):
            places += 1
            low, high = bounds(schema, 10**places)
        return self.text.number(low, high, [1] * (places + 1))

    def _divisors(self, schema: Mapping[str, Any], places: int) -> list[int]:
        """Of what number the digits of a multiple are one, for up to so many decimal places."""
        step = schema.get("multipleOf")
        if step is None:
            return [1] * (places + 1)
        exact = Fraction(decimal(step, "multipleOf"))
        found = [(exact * 10**count).numerator for count in range(places + 1)]
        if max(found) > MOST_DIVISOR or (exact * 10**places).denominator > 1 < places:
            self.unchecked["multipleOf"] = None
            found = [1] * (places + 1)
        return found

    def _array(self, schema: Mapping[str, Any], depth: int) -> Node:
        space, text = self.space, self.text
        first = schema.get("prefixItems", [])
        items = schema.get("items", True)
        if isinstance(items, list):  # before 2020-12
            first, items = items, schema.get("additionalItems", True)
        low, high = count(schema, "minItems") or 0, count(schema, "maxItems")
        others = self._any(items, depth)
        if not first:
            if others is space.none:
                high = 0
            return text.listed("[", others, "]", low, UNBOUNDED if high is None else high)
        # From the back: what may follow `index` items.
        given = len(first)
        more = UNBOUNDED if high is None else max(high - given, 0)
        tail = space.repeat(space.then(text.comma, others), max(low - given, 0), more)
        for index in range(given - 1, -1, -1):
            part = self._any(first[index], depth)
            part = space.then(text.comma, part) if index else part
            ahead = space.none if high is not None and index >= high else space.then(part, tail)
            tail = space.optional(ahead) if index >= low else ahead
        return space.sequence([space.text("["), tail, space.text("]")])

    def _all_of(
        self, owner: Mapping[str, Any], place: str, schemas: Sequence[Any], depth: int
    ) -> Node:
        """What satisfies all of some schemas at a place of their owner."""
        if len(schemas) == 1:
            return self._any(schemas[0], depth)
        key = (id(owner), place)
        if key not in self._plained:
            self._plained[key] = self._merged({}, schemas)
        return self._any(self._plained[key], depth)
