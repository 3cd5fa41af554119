"""What the endpoints share of a request: the model, the sampling fields, thinking, the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from mlx_dgemma.decoding.draws import fresh_seed
from mlx_dgemma.decoding.settings import DecodingSettings, settings_by_name
from mlx_dgemma.prompt import encode_messages
from mlx_dgemma.prompt.media import PreparedPrompt
from mlx_dgemma.prompt.messages import IMAGE_PARTS
from mlx_dgemma.server.accepted import SILENT, WITHOUT_EFFECT
from mlx_dgemma.server.engine import Call, Engine
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.request_images import count_images, prepare_images

# An enum's word in a prompt: a marker before it and after it, and a token at least between them.
_WORD_TOKENS = 3


def check_model(engine: Engine, fields: Fields) -> str:
    """The served model's name; 404 when another one is asked for."""
    served = engine.settings.model_name
    asked = fields.text("model")
    if not engine.settings.serves(asked or ""):
        raise ApiError(
            404,
            f"This server has no model {asked!r}; it serves {served!r} (or 'default').",
            param="model",
            code="model_not_found",
        )
    return served


def decoding_options(engine: Engine, fields: Fields, max_tokens: int | None) -> dict[str, Any]:
    """Keywords of `stream_generate` from the request; ApiError 400 for impossible values."""
    limit = engine.settings.max_output_tokens
    config = engine.runtime.model.config
    options: dict[str, Any] = {
        "max_tokens": min(max_tokens or limit, limit),
        "temp": fields.number("temperature"),
        "preset": fields.text("preset") or engine.settings.preset,
    }
    for name, known in settings_by_name().items():
        if known.request is not None:
            options[name] = fields.value(name)
    options = {name: value for name, value in options.items() if value is not None}
    DecodingSettings.from_defaults(config.generation, options)
    return options


def read_seed(fields: Fields) -> int:
    """The request's seed, or one drawn for it; choice i uses seed + i."""
    seed = fields.integer("seed")
    return fresh_seed() if seed in (None, -1) else seed


def read_warnings(engine: Engine, fields: Fields, max_tokens: int | None) -> tuple[str, ...]:
    """What was asked and is not done. Call it last: it lists every field that was not read."""
    limit = engine.settings.max_output_tokens
    found = [] if (max_tokens or 0) <= limit else [f"max_tokens was cut to this server's {limit}"]
    for name, neutral in WITHOUT_EFFECT.items():
        if fields.raw(name) not in (None, neutral, False):
            found.append(f"{name} has no effect on a diffusion model and was ignored")
    for name in SILENT:
        fields.raw(name)
    found += [f"{name} is not known and was ignored" for name in fields.unread()]
    return tuple(found)


def read_thinking(fields: Fields) -> bool:
    """Thinking is off unless asked for, in any of the ways clients ask."""
    effort = fields.text("reasoning_effort")
    reasoning = fields.object("reasoning")
    if reasoning is not None:
        effort = reasoning.text("effort") or effort
        if reasoning.flag("enabled") is not None:
            return bool(reasoning.flag("enabled"))
    template = fields.object("chat_template_kwargs")
    asked = fields.flag("enable_thinking")
    if template is not None and asked is None:
        asked = template.flag("enable_thinking")
    return asked if asked is not None else effort not in (None, "", "none")


async def make_call(
    engine: Engine,
    messages: list[Any],
    tools: list[Any],
    options: Mapping[str, Any],
    *,
    thinking: bool,
    drafts: bool,
    seed: int,
    warnings: tuple[str, ...],
    image_tokens: int | None = None,
    hold: Callable[[int], None],
) -> Call:
    """A chat call, encoded once here so that a bad request fails before it waits."""
    keywords: dict[str, Any] = {"tools": tools or None, "enable_thinking": thinking}
    if count_images(messages):
        prompt, left_out = await prepare_images(engine, messages, image_tokens, keywords, hold)
        ids, warnings = prompt.ids, (*warnings, *left_out)
    else:
        ids = await asyncio.to_thread(encode_messages, engine.tokenizer, messages, **keywords)
        prompt = PreparedPrompt(ids)
    check_room(engine, ids, "messages")
    return Call(prompt, ids, {**options, **keywords, "seed": seed}, drafts, warnings)


def check_length(engine: Engine, value: Any, param: str) -> None:
    """Refuses text that cannot fit, however well it encodes, before it is encoded."""
    longest = engine.tokenizer.longest
    word = _WORD_TOKENS * longest if "escape" in engine.tokenizer.ids else 0
    most = engine.room * longest
    if _characters(value, most, word) > most:
        raise _too_long(engine, f"at least {engine.room + 1}", param)


def _characters(value: Any, most: int, word: int) -> int:
    """Characters of all texts of a prompt, images apart; counted until there are too many.

    word: as how many each value of an enum counts at least.
    """
    count, waiting = 0, [value]
    while waiting and count <= most:
        one = waiting.pop()
        if isinstance(one, str):
            count += len(one)
        elif isinstance(one, Mapping):
            enum = one.get("enum")
            for text in enum if isinstance(enum, list) else ():
                count += max(word - len(text), 0) if isinstance(text, str) else 0
            seen = one.get("type") in IMAGE_PARTS
            waiting += () if seen else one.values()
        elif isinstance(one, list):
            waiting += one
    return count


def check_room(engine: Engine, ids: list[int], param: str) -> None:
    if len(ids) > engine.room:
        raise _too_long(engine, f"{len(ids)}", param)


def _too_long(engine: Engine, tokens: str, param: str) -> ApiError:
    """In the words that clients look for, to make their conversation shorter."""
    too_long = f"prompt is too long: {tokens} tokens > {engine.room} maximum"
    return ApiError(
        400,
        f"This model's maximum context length is {engine.room} tokens. However, your messages "
        f"resulted in {tokens} tokens. Please reduce the length of the {param} (the "
        f"{too_long}).",
        param=param,
        code="context_length_exceeded",
        anthropic_message=too_long,
    )
