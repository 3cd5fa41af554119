"""Tool calls in the model's own syntax, their arguments held to the tools' schemas.

    <|tool_call>call:name{key:<|"|>text<|"|>,n:1,list:[true,null],nested:{k:2}}<tool_call|>

Names of arguments come sorted, as the chat template writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_dgemma.constraints.characters import ANY, Characters
from mlx_dgemma.constraints.expressions import EVERYTHING, Node, Space
from mlx_dgemma.constraints.json_schema import SchemaLanguage
from mlx_dgemma.constraints.json_text import JsonText
from mlx_dgemma.constraints.vocabulary import CONTROLS
from mlx_dgemma.errors import LanguageError
from mlx_dgemma.prompt.tools import is_argument_name, is_tool_name

_BEGIN, _END, _QUOTE = CONTROLS["stc"], CONTROLS["etc"], CONTROLS["escape"]
_MOST_CALLS = 16


@dataclass(frozen=True)
class ToolCalls:
    """tools: name and parameters of each that may be called.

    forced: the reply is a call, or several where `one` is false; else calls come inside free text.
    otherwise: with `forced`, a schema that the reply may satisfy instead.
    """

    tools: tuple[tuple[str, Any], ...]
    forced: bool
    one: bool = False
    otherwise: Any = None


def tool_language(space: Space, calls: ToolCalls) -> tuple[Node, tuple[str, ...]]:
    """The replies, and what of the tools' schemas they are not held to."""
    options, unchecked, text = [], [], CallText(space)
    for name, parameters in calls.tools:
        if not is_tool_name(name):
            if calls.forced:
                raise LanguageError(f"The tool {name!r:.60} has a name that no call can write.")
            continue
        arguments, left = _arguments(space, text, parameters)
        unchecked += [f"{keyword} in the parameters of {name}" for keyword in left]
        options.append(space.sequence([space.text(f"call:{name}"), arguments]))
    marked = [_symbol(space, _BEGIN), space.either(options), _symbol(space, _END)]
    call = space.sequence(marked)
    if calls.forced:
        reply = call if calls.one else space.repeat(call, 1, _MOST_CALLS)
        if calls.otherwise is not None:
            schema = SchemaLanguage(space, calls.otherwise)
            reply = space.either([reply, schema.build()])
            unchecked += schema.unchecked
        return reply, tuple(unchecked)
    free = space.repeat(space.symbols(EVERYTHING & ~(1 << _BEGIN)))
    more = space.repeat(space.then(call, free), 0, 1 if calls.one else -1)
    return space.then(free, more), tuple(unchecked)


def _arguments(space: Space, text: CallText, parameters: Any) -> tuple[Node, Sequence[str]]:
    parameters = parameters or {}
    if isinstance(parameters, Mapping) and not parameters.get("properties"):
        closed = "properties" in parameters or parameters.get("additionalProperties") is False
        if closed and not parameters.get("required") and "$ref" not in parameters:
            return space.text("{}"), ()
    schema = SchemaLanguage(space, {"type": "object", **parameters}, text)
    return schema.build(), tuple(schema.unchecked)


class CallText(JsonText):
    """The call syntax in the place of JSON's: other quotes, bare names, no white space."""

    @cached_property
    def comma(self) -> Node:
        return self.regex(",")

    @cached_property
    def colon(self) -> Node:
        return self.regex(":")

    def quoted(self, content: Node) -> Node:
        quote = _symbol(self.space, _QUOTE)
        return self.space.sequence([quote, content, quote])

    def key(self, name: str) -> Node:
        bare = self.space.text(name)
        return bare if is_argument_name(name) else self.quoted(bare)

    def key_forms(self, name: str) -> list[Sequence[int]]:
        quoted = super().key_forms(name)
        return [*quoted, name.encode()] if quoted else []

    def any_key(self, content: Node | None) -> Node:
        bare = self.regex(r"[A-Za-z_][A-Za-z0-9_-]*")
        return bare if content is None else self.quoted(content)

    def order(self, properties: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return sorted(properties.items(), key=lambda item: item[0].lower())

    def _spellings(self, value: Any) -> list[Sequence[int]]:
        try:
            return [_spelled(value)]
        except UnicodeEncodeError:  # half of a surrogate pair, for which there is no escape here
            return []

    def object_of(self, depth: int) -> Node:
        member = self.space.sequence([self.any_key(None), self.colon, self.value(depth - 1)])
        return self.listed("{", member, "}")

    def _character(self, characters: Characters) -> Node:
        return (characters & ANY).expression(self.space)


def _symbol(space: Space, symbol: int) -> Node:
    return space.symbols(1 << symbol)


def _spelled(value: Any) -> list[int]:
    """A constant as a call writes it."""
    if isinstance(value, str):
        return [_QUOTE, *value.encode(), _QUOTE]
    if isinstance(value, Mapping):
        members = []
        for name, inner in sorted(value.items(), key=lambda item: item[0].lower()):
            key = list(name.encode()) if is_argument_name(name) else _spelled(name)
            members.append([*key, ord(":"), *_spelled(inner)])
        return [ord("{"), *_joined(members), ord("}")]
    if isinstance(value, list):
        return [ord("["), *_joined([_spelled(inner) for inner in value]), ord("]")]
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return list(text.encode())


def _joined(parts: list[list[int]]) -> list[int]:
    joined: list[int] = []
    for part in parts:
        joined += [ord(","), *part] if joined else part
    return joined
