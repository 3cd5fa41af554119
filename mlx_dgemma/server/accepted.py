"""What a request's fields may hold: one record a field.

Requests are checked by these records (`fields.py`), and `/openapi.json` is written from them. Here
is what several endpoints share; each adds its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_dgemma.decoding.draws import MAX_SEED
from mlx_dgemma.decoding.settings import PRESETS, Setting, settings_by_name
from mlx_dgemma.prompt.messages import IMAGE_PARTS, ROLES, TEXT_PARTS
from mlx_dgemma.prompt.patches import BUDGETS

Kind = Literal[
    "any", "text", "integer", "limit", "number", "flag", "list", "strings", "object"
]  # "limit" is a number of tokens, "strings" one or several
MAX_INTEGER = 2**63 - 1
MAX_STOP_STRINGS = 16
_TYPES = {"text": "string", "flag": "boolean", "list": "array", "limit": "integer"}


@dataclass(frozen=True)
class Accepts:
    """What one field may hold; null is as good as no field unless it is required.

    low, high: of numbers, inclusive. choices: of texts. most: of strings. inside: the fields of an
    object, None where they have any names. schema: of the values of a list or an object, or of the
    whole value of kind "any", in JSON schema; it is not what checks them. about: what it does.
    """

    kind: Kind = "any"
    low: float = 0
    high: float = MAX_INTEGER
    choices: tuple[str, ...] = ()
    most: int = 0
    inside: Known | None = None
    schema: Mapping[str, Any] = field(default_factory=dict)
    required: bool = False
    about: str = ""

    @property
    def expected(self) -> str:
        """What the field must be, as a refusal ends."""
        if self.kind in ("integer", "limit"):
            plain = self.kind == "limit" or self.high == MAX_INTEGER
            bound = f"at least {self.low}" if plain else f"from {self.low} to {self.high}"
            return f"a whole number {bound}"
        if self.kind == "text" and self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind == "strings" and self.most:
            return f"a string or a list of at most {self.most} strings"
        return {
            "number": f"a number from {self.low:g} to {self.high:g}",
            "flag": "true or false",
            "list": "a list",
            "object": "a JSON object",
            "strings": "a string or a list of strings",
        }.get(self.kind, "a string")

    def json_schema(self) -> dict[str, Any]:
        """The same in JSON schema (draft 2020-12)."""
        found = self._value()
        if not self.required and found:
            found = {"anyOf": [found, {"type": "null"}]}
        return {**found, "description": self.about} if self.about else found

    def _value(self) -> dict[str, Any]:
        if self.kind == "any":
            return dict(self.schema)
        if self.kind == "strings":
            text = {"type": "string"}
            return {"anyOf": [text, {"type": "array", "items": text, "maxItems": self.most}]}
        found: dict[str, Any] = {"type": _TYPES.get(self.kind, self.kind)}
        if self.kind in ("integer", "number", "limit"):
            found |= {"minimum": self.low, "maximum": self.high}
        if self.kind == "limit":
            return {"anyOf": [found, {"const": -1, "description": "no limit"}]}
        if self.choices:
            found["enum"] = list(self.choices)
        if self.kind == "list" and self.schema:
            found["items"] = dict(self.schema)
        if self.kind == "object" and self.schema:
            found["additionalProperties"] = dict(self.schema)
        if self.inside is not None:
            found |= object_schema(self.inside)
        return found


Known = Mapping[str, Accepts]


def object_schema(known: Known) -> dict[str, Any]:
    """Of an object with these fields; it may have others, which are ignored with a warning."""
    required = [name for name, accepts in known.items() if accepts.required]
    properties = {name: accepts.json_schema() for name, accepts in known.items()}
    return {"type": "object", "properties": properties} | (
        {"required": required} if required else {}
    )


@dataclass(frozen=True)
class Bounds:
    """What the operator and the model bound. choices: the largest `n`. canvas: its length.
    vocabulary: how many token ids there are."""

    choices: int
    canvas: int
    vocabulary: int


# Fields that steer autoregressive sampling, and the value that asks for nothing.
WITHOUT_EFFECT: dict[str, Any] = {
    "top_p": 1,
    "top_k": None,
    "min_p": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "best_of": 1,
}
# Fields about accounts, storage and billing, which change no reply.
SILENT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity", "include", "truncation", "client_metadata",
)  # fmt: skip

_TEXT = {"type": "string"}
_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "type": {"enum": [*TEXT_PARTS, *IMAGE_PARTS]},
            "text": _TEXT,
            "image_url": {
                "anyOf": [_TEXT, {"type": "object", "properties": {"url": _TEXT}}],
            },
        },
        "required": ["type"],
    },
}
CONTENT = {"anyOf": [_TEXT, _PARTS]}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [*CONTENT["anyOf"], {"type": "null"}]},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": _TEXT,
    },
    "required": ["role"],
}
TOOL = {
    "type": "object",
    "properties": {
        "type": _TEXT,
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "description": _TEXT,
                "parameters": {"type": "object"},
            },
            "required": ["name"],
        },
    },
}


def shared(bounds: Bounds, stop: str | None = "stop") -> dict[str, Accepts]:
    """Of every endpoint that gives replies. stop: the name of its field with stop strings."""
    about = "Has no effect on a diffusion model."
    return {
        "model": Accepts("text", about="The served model's name, or 'default'."),
        "temperature": Accepts("number", 0, 2),
        "preset": Accepts("text", choices=tuple(PRESETS)),
        **{
            name: _setting(name, known, bounds)
            for name, known in settings_by_name().items()
            if known.request is not None
        },
        "seed": Accepts("integer", -1, MAX_SEED - bounds.choices, about="-1 draws one."),
        "stream": Accepts("flag"),
        "stream_options": Accepts(
            "object",
            inside={
                "include_usage": Accepts("flag"),
                "include_drafts": Accepts("flag", about="The canvas after every step."),
            },
        ),
        **({} if stop is None else {stop: Accepts("strings", most=MAX_STOP_STRINGS)}),
        **dict.fromkeys(WITHOUT_EFFECT, Accepts(about=about)),
        **dict.fromkeys(SILENT, Accepts(about="Changes no reply.")),
    }


def structured_outputs() -> dict[str, Accepts]:
    """Of every endpoint whose replies can be held to a language."""
    return {
        "structured_outputs": Accepts(
            "object",
            inside={name: Accepts() for name in ("regex", "choice", "json")},
            about="One of the three.",
        ),
    }


def chatting() -> dict[str, Accepts]:
    """Of every endpoint that takes a conversation."""
    return {
        "image_tokens": Accepts("integer", BUDGETS[0], BUDGETS[-1]),
        **structured_outputs(),
    }


def openai_chatting() -> dict[str, Accepts]:
    """What chat completions and Responses have in common."""
    flag = Accepts("flag")
    return {
        **chatting(),
        "tool_choice": Accepts(
            schema={"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}
        ),
        "parallel_tool_calls": flag,
        "reasoning_effort": Accepts("text", about="'none' is no thinking."),
        "reasoning": Accepts("object", inside={"effort": Accepts("text"), "enabled": flag}),
        "enable_thinking": flag,
        "chat_template_kwargs": Accepts("object", inside={"enable_thinking": flag}),
    }


def format_of(name: str) -> Accepts:
    """A form to answer in."""
    return Accepts(
        "object",
        inside={
            "type": Accepts("text", choices=("text", "json_object", "json_schema")),
            "schema": Accepts(schema={"type": ["object", "boolean"]}),
            "json_schema": Accepts(
                "object", inside={"schema": Accepts(schema={"type": ["object", "boolean"]})}
            ),
        },
        about=f"{name} as text, JSON, or JSON in a schema.",
    )


def _setting(name: str, known: Setting, bounds: Bounds) -> Accepts:
    """A decoding setting, within what a request may ask of it."""
    about = known.help
    if known.kind is str:
        return Accepts("text", choices=tuple(known.request or ()) or known.choices, about=about)
    low, high = known.request or (known.low, known.high)
    if name == "canvas_length":
        high = min(high, bounds.canvas)
    return Accepts("integer" if known.kind is int else "number", low, high, about=about)
