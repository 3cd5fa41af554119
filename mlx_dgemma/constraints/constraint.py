"""What a reply must be: the public form of a constraint, and its language over a vocabulary.

Constraint.regex(r"\\d{4}-\\d\\d")          Constraint.json_schema({"type": "object", ...})
Constraint.choice(["yes", "no"])          Constraint.json_object()
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.expressions import Node, Space
from mlx_dgemma.constraints.json_schema import SchemaLanguage
from mlx_dgemma.constraints.json_text import JsonText
from mlx_dgemma.constraints.regex import full_match
from mlx_dgemma.constraints.shortest import NEVER, shortest_length
from mlx_dgemma.constraints.tool_calls import ToolCalls, tool_language
from mlx_dgemma.constraints.vocabulary import Vocabulary
from mlx_dgemma.errors import LanguageError
from mlx_dgemma.prompt.tokenizer import Tokenizer

MOST_CHOICES = 5_000
_MOST_CHARACTERS = 200_000  # of choices, or of a schema as JSON
_MOST_NEEDED = 50_000  # bytes of the shortest text
_LOOKED_AT = 64  # states near the start that are built before anything is generated
_MOST_ALTERNATIVES = 20_000  # of those states together: a count, for a clock would refuse by chance

_KINDS = ("regex", "choice", "json", "json_object", "tool_calls", "everything")

_vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


@dataclass(frozen=True)
class Language:
    """A constraint compiled for a vocabulary; for one reply, for its automaton grows.

    unchecked: keywords of a schema that the language does not hold the reply to.
    opener: an id without which every text from the start state on is in the language.
    source: what it was compiled from.
    """

    automaton: Automaton
    unchecked: tuple[str, ...] = ()
    opener: int | None = None
    source: Constraint | None = None


@dataclass(frozen=True)
class Constraint:
    """What a whole reply must be. Made by its class methods; `spec` is what they were given."""

    kind: str
    value: Any = field(hash=False)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that the pattern matches from its first character to the last."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Constraint:
        """One of the texts."""
        listed = isinstance(texts, Iterable) and not isinstance(texts, str | bytes)
        return cls("choice", list(texts) if listed else texts)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Constraint:
        """JSON that satisfies the schema."""
        return cls("json", schema)

    @classmethod
    def json_object(cls) -> Constraint:
        """A JSON object of any shape, nested at most four deep inside."""
        return cls("json_object", True)

    @classmethod
    def tool_calls(cls, calls: ToolCalls) -> Constraint:
        """Calls of tools with the arguments they take."""
        return cls("tool_calls", calls)

    @classmethod
    def everything(cls) -> Constraint:
        """No constraint; for tests of what a constraint must not change."""
        return cls("everything", True)

    @classmethod
    def from_record(cls, record: Any) -> Constraint:
        """The constraint of which `asdict` made the record; TypeError for what is none."""
        made = cls(**record)
        if made.kind not in _KINDS:
            raise TypeError(f"{made.kind!r} is no kind of constraint")
        if made.kind == "tool_calls":
            value = dict(made.value)
            tools = tuple((str(name), parameters) for name, parameters in value.pop("tools"))
            return cls.tool_calls(ToolCalls(tools, **value))
        return made

    def check(self) -> tuple[str, ...]:
        """Keywords of a schema to which the language does not hold a reply.

        LanguageError as from `language`, for which no vocabulary is needed."""
        return self._expression("", "")[2]

    def language(
        self, tokenizer: Tokenizer, vocab_size: int, *, before: str = "", after: str = ""
    ) -> Language:
        """Compiles it; LanguageError for one that is malformed, empty or too large.

        before, after: texts that every text of it stands between."""
        space, node, unchecked = self._expression(before, after)
        automaton = Automaton(space, node, vocabulary(tokenizer, vocab_size))
        free = self.kind == "tool_calls" and not self.value.forced
        opener = tokenizer.ids.get("stc") if free else None
        return Language(automaton, unchecked, opener, self)

    def _expression(self, before: str, after: str) -> tuple[Space, Node, tuple[str, ...]]:
        space = Space()
        try:
            with space.bounded():
                node, unchecked = self._node(space)
                node = space.sequence([space.text(before), node, space.text(after)])
                least = shortest_length(space, node)
                if least >= NEVER:
                    raise LanguageError(
                        "No text satisfies the constraint: take one of its rules out."
                    )
                if least > _MOST_NEEDED:
                    raise LanguageError(
                        f"The shortest text that satisfies the constraint has {least} bytes; "
                        f"{_MOST_NEEDED} are the most."
                    )
                _look_ahead(space, node)
        except RecursionError:
            raise LanguageError(
                "The constraint is nested too deeply: take some of its levels out."
            ) from None
        return space, node, unchecked

    def _node(self, space: Space) -> tuple[Node, tuple[str, ...]]:
        if self.kind == "regex":
            return full_match(space, self.value), ()
        if self.kind == "choice":
            return space.choice(_choices(self.value)), ()
        if self.kind == "json":
            _check_schema(self.value)
            schema = SchemaLanguage(space, self.value)
            node = schema.build()
            if node is space.none and schema.impossible:
                raise LanguageError(schema.impossible[0])
            return node, tuple(schema.unchecked)
        if self.kind == "json_object":
            text = JsonText(space)
            return text.object_of(4), ()
        if self.kind == "tool_calls":
            return tool_language(space, self.value)
        return space.anything, ()


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """A tokenizer's, made once."""
    found = _vocabularies.get(tokenizer)
    if found is None or found.size != size:
        found = _vocabularies[tokenizer] = Vocabulary(tokenizer, size)
    return found


def _look_ahead(space: Space, node: Node) -> None:
    """Builds the first states, so that what explodes does so before anything is generated."""
    seen, queue, alternatives = {node.number}, [node], 0
    while queue and len(seen) < _LOOKED_AT:
        for _, target in space.moves(queue.pop(0)):
            if target.number not in seen and shortest_length(space, target) < NEVER:
                seen.add(target.number)
                queue.append(target)
                alternatives += len(target.children)
        if alternatives > _MOST_ALTERNATIVES:
            raise LanguageError("The constraint's automaton grows too fast: make it simpler.")


def _choices(texts: Any) -> list[bytes]:
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise LanguageError("A choice is a list of at least one text.")
    if len(texts) > MOST_CHOICES or sum(map(len, texts)) > _MOST_CHARACTERS:
        raise LanguageError(
            f"A choice has at most {MOST_CHOICES} texts of {_MOST_CHARACTERS} characters together."
        )
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError:
        raise LanguageError(
            "A choice holds half of a surrogate pair, which no text has: take it out."
        ) from None


def _check_schema(schema: Any) -> None:
    """By its text, counted as it comes: parts that stand in it twice may be one object in Python,
    and such a schema be longer than any memory."""
    size = 0
    try:
        for part in json.JSONEncoder(allow_nan=False).iterencode(schema):
            size += len(part)
            if size > _MOST_CHARACTERS:
                break
    except (TypeError, ValueError, RecursionError):
        raise LanguageError(
            "The schema cannot be written as JSON: leave out what JSON has no form for."
        ) from None
    if size > _MOST_CHARACTERS:
        raise LanguageError(f"The schema has more than {_MOST_CHARACTERS} characters as JSON.")
