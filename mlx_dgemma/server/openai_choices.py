"""What /v1/chat/completions and /v1/completions share: choices, whole or in chunks, and usage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from starlette.requests import Request

from mlx_dgemma.decoding.events import Commit, Draft
from mlx_dgemma.server.drafts import DraftWriter
from mlx_dgemma.server.engine import Call, Ended, Engine
from mlx_dgemma.server.errors import as_api_error
from mlx_dgemma.server.replies import Reply, collect, interleave, new_id
from mlx_dgemma.server.requests import ParsedRequest, respond
from mlx_dgemma.server.sse import data

# (reply so far, what was committed, the calls it completed) -> choices without their index
Write = Callable[[Reply, Commit, list[dict[str, Any]]], Iterable[dict[str, Any]]]


async def answer(
    engine: Engine,
    request: Request,
    asked: ParsedRequest,
    *,
    prefix: str,
    kinds: tuple[str, str],
    choice: Callable[[Reply], dict[str, Any]],
    first: dict[str, Any] | None,
    write: Write,
    last: Callable[[Reply], dict[str, Any]],
) -> Any:
    """The response: one object, or a stream's chunks.

    prefix: of its id. kinds: what its `object` says, whole and in chunks. choice: a whole reply's
        choice without its index. first, write, last: see `chunks`.
    """
    whole_kind, chunk_kind = kinds

    async def whole() -> dict[str, Any]:
        replies = await collect(engine, asked.calls, one_call=asked.one_call)
        return body(asked, head(asked, prefix, whole_kind), replies, map(choice, replies))

    def events() -> AsyncGenerator[bytes, None]:
        return chunks(engine, asked, head(asked, prefix, chunk_kind), first, write, last)

    return await respond(request, asked, whole=whole, events=events)


def head(asked: ParsedRequest, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": new_id(prefix, "-"),
        "object": kind,
        "created": int(time.time()),
        "model": asked.model,
    }


def body(
    asked: ParsedRequest,
    top: dict[str, Any],
    replies: list[Reply],
    choices: Iterable[dict[str, Any]],
) -> dict[str, Any]:
    numbered = [
        {"index": index, **choice, "x_diffusion": reply.facts()}
        for index, (choice, reply) in enumerate(zip(choices, replies, strict=True))
    ]
    warnings = all_warnings(asked.call, replies)
    return {
        **top,
        "choices": numbered,
        "usage": usage(replies, asked.choices),
        "x_warnings": warnings,
    }


async def chunks(
    engine: Engine,
    asked: ParsedRequest,
    top: dict[str, Any],
    first: dict[str, Any] | None,
    write: Write,
    last: Callable[[Reply], dict[str, Any]],
) -> AsyncGenerator[bytes, None]:
    """A stream's events. first, last: each choice's opening (or none) and closing chunk."""
    replies = [Reply(one_call=asked.one_call) for _ in asked.calls]
    drafts = [DraftWriter(engine.tokenizer) for _ in asked.calls]

    def chunk(index: int, choice: dict[str, Any], **more: Any) -> bytes:
        filled = {"index": index, "finish_reason": None, "logprobs": None, **choice}
        return data({**top, "choices": [filled], **more})

    for index in range(len(replies) if first is not None else 0):
        yield chunk(index, first or {})
    try:
        async with contextlib.aclosing(interleave(engine, asked.calls)) as events:
            async for index, event in events:
                reply = replies[index]
                calls = reply.add(event)
                if isinstance(event, Draft):
                    draft = {"index": index, **drafts[index].write(event)}
                    yield data({**top, "choices": [], "x_draft": draft})
                elif isinstance(event, Ended):
                    closing = {**last(reply), "x_diffusion": reply.facts()}
                    warnings = [*asked.calls[index].warnings, *reply.warnings()]
                    # Clients look into choices[0] of every chunk they did not ask for.
                    yield chunk(index, closing, **({"x_warnings": warnings} if warnings else {}))
                else:
                    for choice in write(reply, event, calls):
                        yield chunk(index, choice)
    except Exception as error:
        engine.report(error)
        yield data(as_api_error(error).openai())
        return
    if asked.include_usage:
        yield data({**top, "choices": [], "usage": usage(replies, asked.choices)})
    yield b"data: [DONE]\n\n"


def usage(replies: list[Reply], choices: int) -> dict[str, Any]:
    """Each prompt once, however many choices were generated from it."""
    firsts = replies[::choices]
    prompt = sum(reply.end.finish.prompt_tokens for reply in firsts)
    completion = sum(reply.end.finish.generated_tokens for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.end.cached_tokens for r in firsts)},
    }


def all_warnings(call: Call, replies: list[Reply]) -> list[str]:
    several = len(replies) > 1
    return list(call.warnings) + [
        f"choice {index}: {warning}" if several else warning
        for index, reply in enumerate(replies)
        for warning in reply.warnings()
    ]
