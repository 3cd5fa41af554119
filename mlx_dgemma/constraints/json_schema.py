"""JSON Schema as a regular language over JSON's text.

Properties come in the schema's order, optional ones may be left out, names that the schema does not
list only come where it describes them. References may recurse DEPTH times. Annotations are ignored.

What a regular language cannot say is left to a check of the finished value, and `unchecked` names
it: uniqueItems, contains, dependencies, conditions, some `not` and `oneOf`, large multipleOf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from mlx_dgemma.constraints.expressions import UNBOUNDED, Node, Space
from mlx_dgemma.constraints.formats import FORMATS
from mlx_dgemma.constraints.json_text import JsonText
from mlx_dgemma.constraints.keywords import (
    apart,
    bounds,
    check_shapes,
    count,
    decimal,
    is_of_type,
)
from mlx_dgemma.constraints.merging import merged
from mlx_dgemma.errors import LanguageError, UnsupportedError

DEPTH = 5  # how often a reference may recurse
_MOST_NESTED = 60
_MOST_MERGES = 2_000
_PLACES = 6  # of a number with bounds
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_CHECKED_LATER = (
    *("uniqueItems", "contains", "minContains", "dependentRequired", "dependentSchemas"),
    *("dependencies", "if", "unevaluatedProperties", "unevaluatedItems"),
)
_OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


class SchemaLanguage:
    """Builds expressions of schemas that share one root.

    unchecked: the keywords that the language leaves to a check, where they stand.
    """

    def __init__(self, space: Space, root: Any, text: JsonText | None = None) -> None:
        self.space = space
        self.text = text or JsonText(space)
        self.root = root
        self.unchecked: dict[str, None] = {}
        self._known: dict[tuple[int, int], Node] = {}
        self._open: frozenset[int] = frozenset()
        self._plained: dict[tuple[int, str], Any] = {}
        self._merges = 0
        self._level = 0
        self._kinds: dict[str, Callable[[Mapping[str, Any], int], Node]] = {
            "object": self._object,
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
        if "$ref" in schema or "allOf" in schema:
            return self._any(self._plain(schema), depth)
        for name in _CHECKED_LATER:
            if schema.get(name) not in (None, False):
                self.unchecked[name] = None
        if "const" in schema:
            return self._enum({**schema, "enum": [schema["const"]]})
        if "enum" in schema:
            return self._enum(schema)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._options(schema, name, depth)
        kinds = self._types(schema)
        node = self.space.either(self._kinds[kind](schema, depth) for kind in kinds)
        return self._without(schema, node)

    def _plain(self, schema: Mapping[str, Any]) -> Any:
        """References followed and allOf merged; the same object for the same schema."""
        key = (id(schema), "plain")
        if key not in self._plained:
            siblings, parts = self._parts(schema)
            alone = len(parts) == 1 and not any(name in MEANINGFUL for name in siblings)
            self._plained[key] = parts[0] if alone else self._merged([siblings, *parts])
        return self._plained[key]

    def _merged(self, schemas: list[Any]) -> Any:
        """One schema for all; what cannot be joined is left to the check."""
        result: Any = {}
        for schema in schemas:
            try:
                result = merged([result, self._flat(schema, 0)])
            except UnsupportedError:
                self.unchecked["allOf"] = None
        return result

    def _flat(self, schema: Any, level: int) -> Any:
        if not isinstance(schema, Mapping) or not ("$ref" in schema or "allOf" in schema):
            return schema
        self._merges += 1
        if level > _MOST_NESTED or self._merges > _MOST_MERGES:
            raise LanguageError(
                "The schema's references go round in a circle, or join too much: describe a value."
            )
        siblings, parts = self._parts(schema)
        return merged([siblings, *(self._flat(part, level + 1) for part in parts)])

    def _parts(self, schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """What stands beside the references and allOf of a schema, and what these hold."""
        siblings = {k: v for k, v in schema.items() if k not in ("$ref", "allOf")}
        parts = [self.resolve(schema["$ref"])] if "$ref" in schema else []
        check_shapes(schema)
        return siblings, [*parts, *schema.get("allOf", [])]

    def resolve(self, reference: Any) -> Any:
        """What a reference inside the root points at."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise LanguageError(
                f"The schema refers to {reference!r:.60}: only references into itself (#/...) "
                "can be followed; put it under $defs."
            )
        target: Any = self.root
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and step.isdigit() and int(step) < len(target):
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
            kinds = [k for k, names in _OF_TYPE.items() if any(n in schema for n in names)]
            kinds = kinds or [kind for kind in _TYPES if kind != "integer"]
        for kind in kinds:
            if kind not in _TYPES:
                raise LanguageError(f"The schema has a type {kind!r:.40}: use {', '.join(_TYPES)}.")
        if schema.get("nullable") is True and "null" not in kinds:  # OpenAPI 3.0
            kinds = [*kinds, "null"]
        return list(dict.fromkeys(kinds))

    def _enum(self, schema: Mapping[str, Any]) -> Node:
        values = schema["enum"]
        if not isinstance(values, list) or not values:
            raise LanguageError("An enum is a list of at least one value.")
        kinds = self._types(schema) if "type" in schema else list(_TYPES)
        fitting = [value for value in values if any(is_of_type(value, kind) for kind in kinds)]
        if any(name in MEANINGFUL - {"type", "enum", "const", "nullable"} for name in schema):
            self.unchecked["enum"] = None  # what else is asked of the values
        return self.text.constants(fitting)

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
                joined = [self._merged([rest, option]) for option in options]
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
        if unwanted is True:
            return self.space.none
        values = unwanted.get("enum", [unwanted["const"]] if "const" in unwanted else None)
        if isinstance(values, list) and all(isinstance(v, str | bool | None) for v in values):
            return self.space.both([node, self.space.without(self.text.constants(values))])
        self.unchecked["not"] = None
        return node

    # Kinds of values

    def _string(self, schema: Mapping[str, Any], depth: int) -> Node:
        return self.text.quoted(self._content(schema))

    def _content(self, schema: Mapping[str, Any]) -> Node:
        """What stands between the quotes of a string."""
        text, space = self.text, self.space
        conditions = []
        if "$ref" in schema or "allOf" in schema:
            schema = self._plain(schema)
        if isinstance(values := schema.get("enum"), list):
            conditions.append(space.either(text.inside.literal(str(value)) for value in values))
        if "pattern" in schema:
            try:
                conditions.append(text.inside.search(schema["pattern"]))
            except UnsupportedError:
                self.unchecked["pattern"] = None
        elif isinstance(name := schema.get("format"), str) and name in FORMATS:
            conditions.append(text.inside.full(FORMATS[name]))
        low, high = count(schema, "minLength") or 0, count(schema, "maxLength")
        if low or high is not None or not conditions:
            conditions.append(
                space.repeat(text.character, low, UNBOUNDED if high is None else high)
            )
        return space.both(conditions)

    def _integer(self, schema: Mapping[str, Any], depth: int) -> Node:
        low, high = bounds(schema, 1)
        multiple = schema.get("multipleOf", 1)
        if not is_of_type(multiple, "integer") or not 0 < multiple <= 1000:
            self.unchecked["multipleOf"] = None
            multiple = 1
        first = None if low is None else math.ceil(low)
        last = None if high is None else math.floor(high)
        return self.text.integer(first, last, int(multiple))

    def _number(self, schema: Mapping[str, Any], depth: int) -> Node:
        places, multiple = _PLACES, schema.get("multipleOf")
        if multiple is not None:
            step = decimal(multiple, "multipleOf")
            if step == step.to_integral_value():
                return self._integer(schema, depth)
            places = -int(step.as_tuple().exponent)
            if step != Decimal(1).scaleb(-places) or places > 10:
                self.unchecked["multipleOf"] = None
        low, high = bounds(schema, 10**places)
        if low is None and high is None and multiple is None:
            return self.text.any_number
        return self.text.number(low, high, places)

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

    def _object(self, schema: Mapping[str, Any], depth: int) -> Node:
        space, text = self.space, self.text
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        members = [
            (self._member(text.key(name), inner, depth), name in required)
            for name, inner in text.order(properties)
        ]
        patterns = schema.get("patternProperties", {})
        extra = schema.get("additionalProperties", not properties and not patterns)
        for name in required:
            if name not in properties:
                if extra is False:
                    raise LanguageError(f"The schema requires {name!r:.60} and describes it not.")
                members.append((self._member(text.key(name), extra, depth), True))
        others = self._others(schema, properties, patterns, extra, depth)
        return space.sequence([space.text("{"), self._members(schema, members, others),
                               space.text("}")])  # fmt: skip

    def _member(self, name: Node, schema: Any, depth: int) -> Node:
        return self.space.sequence([name, self.text.colon, self._any(schema, depth)])

    def _others(
        self,
        schema: Mapping[str, Any],
        properties: Mapping[str, Any],
        patterns: Mapping[str, Any],
        extra: Any,
        depth: int,
    ) -> Node:
        """A member that the schema does not name."""
        space, text = self.space, self.text
        found: list[Node] = []
        taken: list[Node] = []
        for pattern, inner in patterns.items():
            name = text.any_key(text.inside.search(pattern))
            free = space.both([name, *map(space.without, taken)])
            found.append(self._member(free, inner, depth))
            taken.append(name)
        described = extra is True and not properties and not patterns
        if described or isinstance(extra, Mapping):
            rule = schema.get("propertyNames", True)
            name = text.any_key(None)
            if isinstance(rule, Mapping):
                content = self._content(rule)
                name = text.any_key(content) if content else name
            names = [text.key(known) for known in properties]
            free = space.both([name, *map(space.without, [*names, *taken])])
            found.append(self._member(free, extra, depth))
        return space.either(found)

    def _members(
        self, schema: Mapping[str, Any], members: list[tuple[Node, bool]], others: Node
    ) -> Node:
        space, comma = self.space, self.text.comma
        low, high = count(schema, "minProperties") or 0, count(schema, "maxProperties")
        needed = sum(is_required for _, is_required in members)
        if len(members) > needed and (low > needed or high is not None):
            self.unchecked["minProperties"] = None
            low, high = needed, None
        more = UNBOUNDED if high is None else max(high - needed, 0)
        least = max(low - needed, 0)
        if others is space.none:
            more = least = 0
        # From the back: `after` follows a member, `first` nothing.
        after = space.repeat(space.then(comma, others), least, more)
        rest = space.repeat(space.then(comma, others), max(least - 1, 0), max(more - 1, -1))
        first = space.empty if more == 0 else space.then(others, rest)
        if least == 0:
            first = space.optional(first)
        for member, is_required in reversed(members):
            here, follow = space.then(member, after), space.sequence([comma, member, after])
            first = here if is_required else space.either([here, first])
            after = follow if is_required else space.either([follow, after])
        return first


MEANINGFUL = frozenset(
    ("type", "enum", "const", "anyOf", "oneOf", "not", "nullable", *_CHECKED_LATER)
) | {name for names in _OF_TYPE.values() for name in names} | {
    *("minProperties", "maxProperties", "propertyNames", "additionalItems"),
}  # fmt: skip
