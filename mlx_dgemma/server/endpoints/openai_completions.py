"""POST /v1/completions: raw text or ids, continued without a chat template."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.requests import Request

from mlx_dgemma.decoding.events import Commit
from mlx_dgemma.generate import encode_prompt
from mlx_dgemma.infilling.fill import DEFAULT_PROMPT
from mlx_dgemma.prompt.media import PreparedPrompt
from mlx_dgemma.prompt.tokenizer import Tokenizer
from mlx_dgemma.server.accepted import Accepts, Bounds, shared
from mlx_dgemma.server.engine import Call, Engine
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.openai_choices import answer
from mlx_dgemma.server.replies import Reply
from mlx_dgemma.server.requests import ParsedRequest, read_streaming
from mlx_dgemma.server.sampling import (
    check_length,
    check_model,
    check_room,
    decoding_options,
    read_seed,
    read_warnings,
)
from mlx_dgemma.server.structured import between

DEFAULT_MAX_TOKENS = 256
_IDS = {"type": "array", "items": {"type": "integer"}}


def accepted(bounds: Bounds) -> dict[str, Accepts]:
    """What `/v1/completions` accepts."""
    alone = {"anyOf": [{"type": "string"}, _IDS]}
    one = {"type": "array", "items": alone, "minItems": 1, "maxItems": 1}
    return {
        **shared(bounds),
        "prompt": Accepts(schema={"anyOf": [*alone["anyOf"], one]}, required=True),
        "suffix": Accepts("text"),
        "max_tokens": Accepts("limit", 1, about=f"{DEFAULT_MAX_TOKENS} where it is left out."),
        "n": Accepts("integer", 1, bounds.choices),
        "logprobs": Accepts("integer", 0, 5),
        "echo": Accepts("flag"),
    }


async def read_completion(engine: Engine, fields: Fields) -> tuple[ParsedRequest, str]:
    """The request, and the text that every choice begins with (`echo`)."""
    model = check_model(engine, fields)
    check_length(engine, fields.raw("prompt"), "prompt")
    text, ids = await asyncio.to_thread(_prompt, engine.tokenizer, fields)
    check_room(engine, ids, "prompt")
    suffix = fields.text("suffix")
    choices = fields.integer("n") or 1
    limit = fields.limit("max_tokens")
    # OpenAI's number is how many alternatives to list; there are none here beside the chosen.
    logprobs = fields.integer("logprobs") is not None
    options = {
        **decoding_options(engine, fields, limit or DEFAULT_MAX_TOKENS),
        "stop": fields.strings("stop"),
        "logprobs": logprobs,
    }
    streaming = read_streaming(fields)
    seed = read_seed(fields)
    echo = text if fields.flag("echo") else ""
    warnings = read_warnings(engine, fields, limit)
    call = Call(PreparedPrompt(ids), ids, options, streaming.drafts, warnings)
    if suffix:
        # Both sides stand in the reply; the question is the one the model knows for it.
        if options["stop"] or logprobs:
            raise fields.fail("suffix", "given without stop and logprobs")
        ids = encode_prompt(engine.tokenizer, DEFAULT_PROMPT)
        call = Call(PreparedPrompt(ids), ids, options, False, warnings, between(text, suffix))
    asked = ParsedRequest(
        model=model,
        calls=[call.with_seed(seed + i) for i in range(choices)],
        stream=streaming.stream,
        include_usage=streaming.include_usage,
        logprobs=logprobs,
    )
    return asked, echo


async def completions(engine: Engine, fields: Fields, request: Request) -> Any:
    asked, echo = await read_completion(engine, fields)

    def scores() -> _Scores:
        return _Scores(engine.tokenizer, len(echo))

    streamed = defaultdict[int, _Scores](scores)  # by reply

    def choice(reply: Reply) -> dict[str, Any]:
        return {
            "text": echo + reply.text,
            "finish_reason": _reason(reply),
            "logprobs": scores().write(reply.logprobs) if asked.logprobs else None,
        }

    def write(reply: Reply, event: Commit, __: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if event.text or event.logprobs:
            scored = zip(event.ids, event.logprobs, strict=False)
            listed = streamed[id(reply)].write(scored) if asked.logprobs else None
            yield {"text": event.text, "logprobs": listed}

    return await answer(
        engine,
        request,
        asked,
        prefix="cmpl",
        kinds=("text_completion", "text_completion"),
        choice=choice,
        first={"text": echo} if echo else None,
        write=write,
        last=lambda reply: {"text": "", "finish_reason": _reason(reply)},
    )


def _prompt(tokenizer: Tokenizer, fields: Fields) -> tuple[str, list[int]]:
    """(text, ids) of `prompt`: a string, token ids, or a list with one of either."""
    prompt = fields.raw("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt, [tokenizer.ids["bos"], *tokenizer.encode(prompt)]
    whole = isinstance(prompt, list) and all(type(id_) is int for id_ in prompt)
    if not whole or not prompt:
        raise fields.fail("prompt", "one string or one non-empty list of token ids")
    ids = encode_prompt(tokenizer, prompt)
    return tokenizer.decode(ids, skip_special=True), ids


def _reason(reply: Reply) -> str:
    return "stop" if reply.end.finish.reason == "stop" else "length"


class _Scores:
    """Log-probabilities of one reply, whole or in parts; before: characters that precede it.

    Tokens are the pieces of text they add: one that holds part of a character adds nothing, the
    last of its parts adds it. What fills a canvas is not listed.
    """

    def __init__(self, tokenizer: Tokenizer, before: int) -> None:
        self._tokenizer = tokenizer
        self._reader = tokenizer.detokenizer()
        self._at = before

    def write(self, scored: Iterable[tuple[int, float]]) -> dict[str, Any]:
        pad, control = self._tokenizer.ids.get("pad"), self._tokenizer.control_ids
        shown = [(id_, value) for id_, value in scored if id_ != pad]
        tokens = ["" if id_ in control else self._reader.feed([id_]) for id_, _ in shown]
        ends = list(itertools.accumulate(map(len, tokens), initial=self._at))
        self._at = ends[-1]
        return {
            "tokens": tokens,
            "token_logprobs": [value for _, value in shown],
            "top_logprobs": None,
            "text_offset": ends[:-1],
        }
