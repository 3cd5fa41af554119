"""Objects of a JSON schema: which members come, in which order, under which names.

A name is held to everything that the schema says of it: its property, every pattern that it
matches, `propertyNames`. Names that only patterns or `additionalProperties` describe match exactly
one pattern or none, so that one schema says what their values are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_dgemma.constraints.expressions import UNBOUNDED, Node, Space
from mlx_dgemma.constraints.json_text import JsonText
from mlx_dgemma.constraints.keywords import count
from mlx_dgemma.errors import UnsupportedError

_MEMBER = 10  # what a member counts beside its expressions


class ObjectMembers:
    """Builds the expressions of objects.

    value: the expression of what satisfies all of some schemas; gets the schema that they are part
    of, and where. unchecked: gets the keywords that are left to a check. impossible: gets a
    sentence for an object that cannot be.
    """

    def __init__(
        self,
        space: Space,
        text: JsonText,
        unchecked: dict[str, None],
        impossible: list[str],
        value: Callable[[Mapping[str, Any], str, Sequence[Any], int], Node],
    ) -> None:
        self._space, self._text, self._value = space, text, value
        self._unchecked, self._impossible = unchecked, impossible

    def expression(self, schema: Mapping[str, Any], depth: int) -> Node:
        """The objects that a schema describes."""
        space, text = self._space, self._text
        properties = schema.get("properties", {})
        required = dict.fromkeys(schema.get("required", []))
        patterns = self._patterns(schema)
        names = self._names(schema, depth)
        extra = schema.get("additionalProperties", not properties and not patterns)
        members = []
        for name, inner in text.order(properties):
            rules = [inner, *self._matched(patterns, name)]
            member = self._named(schema, name, rules, names, depth)
            members.append((member, name in required))
        for name in required:
            if name not in properties:
                rules = self._matched(patterns, name)
                rules = rules or [schema.get("additionalProperties", True)]
                if rules == [False]:
                    self._impossible.append(f"The schema requires {name!r:.60} and forbids it.")
                    return space.none
                members.append((self._named(schema, name, rules, names, depth), True))
        taken = [form for name in {**properties, **required} for form in text.key_forms(name)]
        others = self._others(schema, patterns, extra, names, taken, depth)
        inside = self._row(schema, members, others)
        return space.sequence([space.text("{"), inside, space.text("}")])

    def _patterns(self, schema: Mapping[str, Any]) -> list[tuple[Node, Node, Any]]:
        """Of each pattern of names: the names as a key writes them, and bare; their schema."""
        found = []
        for pattern, inner in schema.get("patternProperties", {}).items():
            try:
                bare = self._text.inside.search(pattern)
            except UnsupportedError:
                self._unchecked["patternProperties"] = None
                continue
            found.append((self._text.any_key(bare), bare, inner))
        return found

    def _names(self, schema: Mapping[str, Any], depth: int) -> Node | None:
        """What `propertyNames` lets a name be, as a string; None is anything."""
        rule = schema.get("propertyNames", True)
        if rule is True or rule == {}:
            return None
        return self._space.both([self._text.string, self._value(schema, "names", [rule], depth)])

    def _matched(self, patterns: list[tuple[Node, Node, Any]], name: str) -> list[Any]:
        written = self._text.spelled(name)[1:-1]
        return [inner for _, bare, inner in patterns if self._space.holds(bare, written)]

    def _named(
        self, schema: Mapping[str, Any], name: str, rules: list[Any], names: Node | None, depth: int
    ) -> Node:
        """A member with this name; none where `propertyNames` forbids the name."""
        text = self._text
        self._space.charge(_MEMBER)
        if names is not None and not self._space.holds(names, text.spelled(name)):
            return self._space.none
        value = self._value(schema, f"member {name}", rules, depth)
        return self._member(text.key(name), value)

    def _member(self, name: Node, value: Node) -> Node:
        return self._space.sequence([name, self._text.colon, value])

    def _others(
        self,
        schema: Mapping[str, Any],
        patterns: list[tuple[Node, Node, Any]],
        extra: Any,
        names: Node | None,
        taken: list[Sequence[int]],
        depth: int,
    ) -> Node:
        """A member that the schema does not name."""
        space, text, found = self._space, self._text, []
        allowed = [] if names is None else [names]
        forbidden = [space.without(space.choice(taken))] if taken else []
        for index, (name, _, inner) in enumerate(patterns):
            apart = [space.without(other[0]) for at, other in enumerate(patterns) if at != index]
            free = space.both([name, *allowed, *forbidden, *apart])
            value = self._value(schema, f"pattern {index}", [inner], depth)
            found.append(self._member(free, value))
        unknown = "patternProperties" in schema and len(patterns) < len(schema["patternProperties"])
        described = extra is True and not schema.get("properties") and not patterns
        if not unknown and (described or isinstance(extra, Mapping)):
            anything = text.any_key(None) if names is None else names
            apart = [space.without(other[0]) for other in patterns]
            free = space.both([anything, *forbidden, *apart])
            found.append(self._member(free, self._value(schema, "others", [extra], depth)))
        return space.either(found)

    def _row(
        self, schema: Mapping[str, Any], members: list[tuple[Node, bool]], others: Node
    ) -> Node:
        """The members in order, optional ones left out or not, then those without a name."""
        space, comma = self._space, self._text.comma
        low, high = count(schema, "minProperties") or 0, count(schema, "maxProperties")
        needed = sum(is_required for _, is_required in members)
        if len(members) > needed and (low > needed or high is not None):
            self._unchecked["minProperties"] = None
            low, high = needed, None
        more = UNBOUNDED if high is None else max(high - needed, 0)
        least = max(low - needed, 0)
        if high is not None and high < needed:
            return space.none
        if others is space.none:
            if least:
                return space.none
            more = 0
        if least > 1:
            self._unchecked["minProperties"] = None  # a name may come twice
        # From the back: `after` follows a member, `first` nothing.
        after = space.repeat(space.then(comma, others), least, more)
        rest = space.repeat(space.then(comma, others), max(least - 1, 0), max(more - 1, -1))
        first = space.empty if more == 0 else space.then(others, rest)
        if least == 0:
            first = space.optional(first)
        for member, is_required in reversed(members):
            here = space.then(member, after)
            follow = space.then(comma, here)
            first = here if is_required else space.either([here, first])
            after = follow if is_required else space.either([follow, after])
        return first
