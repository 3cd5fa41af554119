"""POST /v1/completions: raw text or ids, continued without a chat template."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from starlette.requests import Request

from mlx_dgemma.decoding.canvas import Opening
from mlx_dgemma.decoding.events import Commit
from mlx_dgemma.generate import encode_prompt
from mlx_dgemma.infilling.fill import DEFAULT_PROMPT
from mlx_dgemma.prompt.media import PreparedPrompt
from mlx_dgemma.prompt.tokenizer import Tokenizer
from mlx_dgemma.server.accepted import Accepts, Bounds, shared, structured_outputs
from mlx_dgemma.server.echo import Echo, beginning_with
from mlx_dgemma.server.engine import Call, Engine
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.openai_choices import answer
from mlx_dgemma.server.replies import Reply, Scored, scored
from mlx_dgemma.server.requests import ParsedRequest, read_streaming
from mlx_dgemma.server.sampling import (
    check_length,
    check_model,
    check_room,
    decoding_options,
    read_seed,
    read_warnings,
)
from mlx_dgemma.server.structured import between, held, read_outputs, settled
from mlx_dgemma.server.tool_choice import ToolUse

DEFAULT_MAX_TOKENS = 256
MOST_ALTERNATIVES = 5  # OpenAI's bound; they are listed for every token of a prompt, too


def accepted(bounds: Bounds) -> dict[str, Accepts]:
    """What `/v1/completions` accepts."""
    id_ = {"type": "integer", "minimum": 0, "maximum": bounds.vocabulary - 1}
    alone = {"anyOf": [{"type": "string"}, {"type": "array", "items": id_, "minItems": 1}]}
    many = {"type": "array", "items": alone, "minItems": 1}
    limit = f"{DEFAULT_MAX_TOKENS} where it is left out; 0 generates nothing."
    return {
        **shared(bounds),
        **structured_outputs(),
        "prompt": Accepts(schema={"anyOf": [*alone["anyOf"], many]}, required=True),
        "suffix": Accepts("text"),
        "max_tokens": Accepts("limit", 0, about=limit),
        "n": Accepts("integer", 1, bounds.choices, about="Of each prompt."),
        "logprobs": Accepts("integer", 0, MOST_ALTERNATIVES, about="How many alternatives."),
        "echo": Accepts("flag", about="With logprobs the prompt is scored as well."),
    }


class _Prompt(NamedTuple):
    """hidden: ids at its beginning that its text does not show."""

    text: str
    ids: list[int]
    hidden: int


async def read_completion(engine: Engine, fields: Fields) -> ParsedRequest:
    model = check_model(engine, fields)
    choices = fields.integer("n") or 1
    prompts = await _read_prompts(engine, fields, choices)
    suffix = fields.text("suffix")
    limit = fields.limit("max_tokens")
    nothing = limit == 0
    alternatives = fields.integer("logprobs")
    options = {
        **decoding_options(engine, fields, limit or DEFAULT_MAX_TOKENS),
        "stop": fields.strings("stop"),
        "logprobs": alternatives is not None,
        "top_logprobs": alternatives or 0,
    }
    streaming = read_streaming(fields)
    seed = read_seed(fields)
    echo = fields.flag("echo") or False
    wanted = await settled(read_outputs(fields))
    if echo and alternatives is not None and limit == 1 and wanted is None:
        options = _single_token(engine, options)
    warnings = read_warnings(engine, fields, limit)
    if suffix and (options["stop"] or alternatives is not None or len(prompts) > 1):
        raise fields.fail("suffix", "given with one prompt, without stop and logprobs")
    language, checked, _ = await held(engine, wanted, ToolUse())
    if language is not None:
        options["constraint"] = language

    def call(prompt: _Prompt) -> Call:
        ids, drafts = prompt.ids, streaming.drafts
        source = checked
        if suffix:
            # Both sides stand in the reply; the question is the one the model knows for it.
            ids, drafts = encode_prompt(engine.tokenizer, DEFAULT_PROMPT), False
            source = between(prompt.text, suffix, None if wanted is None else wanted.constraint)
        if echo or nothing:
            shown = Echo(prompt.text, prompt.hidden, alternatives) if echo else None
            source = beginning_with(shown, None if nothing else source or Engine.stream)
        return Call(PreparedPrompt(ids), ids, options, drafts, warnings, source)

    return ParsedRequest(
        model=model,
        calls=[call(prompt).with_seed(seed + i) for prompt in prompts for i in range(choices)],
        stream=streaming.stream,
        include_usage=streaming.include_usage,
        logprobs=alternatives is not None,
        choices=choices,
    )


async def completions(engine: Engine, fields: Fields, request: Request) -> Any:
    asked = await read_completion(engine, fields)

    def scores() -> _Scores:
        return _Scores(engine.tokenizer, bool(asked.call.options["top_logprobs"]))

    streamed = defaultdict[int, _Scores](scores)  # by reply

    def choice(reply: Reply) -> dict[str, Any]:
        return {
            "text": reply.text,
            "finish_reason": _reason(reply),
            "logprobs": scores().write(reply.logprobs) if asked.logprobs else None,
        }

    def write(reply: Reply, event: Commit, __: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if event.text or event.logprobs:
            listed = streamed[id(reply)].write(scored(event)) if asked.logprobs else None
            yield {"text": event.text, "logprobs": listed}

    return await answer(
        engine,
        request,
        asked,
        prefix="cmpl",
        kinds=("text_completion", "text_completion"),
        choice=choice,
        first=None,
        write=write,
        last=lambda reply: {"text": "", "finish_reason": _reason(reply)},
    )


def _single_token(engine: Engine, options: dict[str, Any]) -> dict[str, Any]:
    """Scorers (lm-eval's local-completions) ask for the prompt's scores and one token, which they
    throw away: it is denoised on a canvas of one position, and is one that shows."""
    shown = set(range(len(engine.tokenizer))) - engine.tokenizer.control_ids
    return {"canvas_length": 1, **options, "opening": Opening((), tuple(shown))}


async def _read_prompts(engine: Engine, fields: Fields, choices: int) -> list[_Prompt]:
    """`prompt`: a string, token ids, or a list of either."""
    given = fields.raw("prompt")
    many = isinstance(given, list) and any(isinstance(part, str | list) for part in given)
    if many:
        _check_count(engine, fields, len(given), choices)
    found: list[_Prompt] = []
    for prompt in given if many else [given]:
        check_length(engine, prompt, "prompt")
        whole = isinstance(prompt, list) and all(type(id_) is int for id_ in prompt)
        if not isinstance(prompt, str) and not (whole and prompt):
            found = []
            break
        found.append(await asyncio.to_thread(_encoded, engine.tokenizer, prompt))
        check_room(engine, found[-1].ids, "prompt")
    if not found:
        raise fields.fail("prompt", "a string, a list of token ids, or a list of either")
    return found


def _encoded(tokenizer: Tokenizer, prompt: str | list[int]) -> _Prompt:
    if isinstance(prompt, str):
        return _Prompt(prompt, [tokenizer.ids["bos"], *tokenizer.encode(prompt)], 1)
    ids = encode_prompt(tokenizer, prompt)
    return _Prompt(tokenizer.decode(ids, skip_special=True), ids, 0)


def _check_count(engine: Engine, fields: Fields, prompts: int, choices: int) -> None:
    """Refuses more replies than could ever be admitted, which no waiting would help."""
    most = engine.settings.max_concurrent + engine.settings.max_waiting
    if prompts * choices > most:
        raise fields.fail("prompt", f"a list of at most {most // choices} prompts for n={choices}")


def _reason(reply: Reply) -> str:
    return "stop" if reply.end.finish.reason == "stop" else "length"


class _Scores:
    """Log-probabilities of one reply, whole or in parts; alternatives: whether any are listed.

    Tokens are the pieces of text they add: one that holds part of a character adds nothing, the
    last of its parts adds it. What fills a canvas is not listed; a prompt's ids are, one for one.
    """

    def __init__(self, tokenizer: Tokenizer, alternatives: bool) -> None:
        self._tokenizer = tokenizer
        self._alternatives = alternatives
        self._reader = tokenizer.detokenizer()
        self._at = 0

    def write(self, listed: Iterable[Scored]) -> dict[str, Any]:
        pad, control = self._tokenizer.ids.get("pad"), self._tokenizer.control_ids
        shown = [one for one in listed if one.of_prompt or one.id != pad]
        tokens = ["" if one.id in control else self._reader.feed([one.id]) for one in shown]
        ends = list(itertools.accumulate(map(len, tokens), initial=self._at))
        self._at = ends[-1]
        return {
            "tokens": tokens,
            "token_logprobs": [_known(one.logprob) for one in shown],
            "top_logprobs": [self._top(one) for one in shown] if self._alternatives else None,
            "text_offset": ends[:-1],
        }

    def _top(self, one: Scored) -> dict[str, float] | None:
        """The likeliest tokens by their text, and the one that stands there."""
        if math.isnan(one.logprob):
            return None
        found: dict[str, float] = {}
        for id_, logprob in (*one.alternatives, (one.id, one.logprob)):
            found.setdefault(self._name(id_), logprob)
        return found

    def _name(self, id_: int) -> str:
        """Its text; of one byte of a character, which alone is none, the vocabulary's spelling."""
        byte = self._tokenizer.is_byte(id_)
        return self._tokenizer.token(id_) if byte else self._tokenizer.decode([id_])


def _known(logprob: float) -> float | None:
    """None for the first token of all, before which there is nothing."""
    return None if math.isnan(logprob) else logprob
