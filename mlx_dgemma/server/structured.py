"""Replies that stand around holes: `response_format` pins what a schema fixes and checks the rest,
`suffix` pins both sides. Their text comes in one piece, and they take turns like any reply."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from mlx_dgemma.decoding.events import Commit, Draft, Finish
from mlx_dgemma.infilling import Infill
from mlx_dgemma.prompt.holes import Hole
from mlx_dgemma.server.attempts import ATTEMPTS, seed_of
from mlx_dgemma.server.engine import Call, Ended, Engine, Source
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.schema import Schema

_ANY_OBJECT = {"type": "object"}


def read_format(fields: Fields | None, name: str = "response_format") -> Schema | None:
    """None for plain text; ApiError 400 for a format or schema that cannot be pinned."""
    wanted = None if fields is None else fields.object(name)
    if fields is None or wanted is None:
        return None
    kind = wanted.text("type", ("text", "json_object", "json_schema"))
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return Schema(_ANY_OBJECT, fields.path(name))
    # Chat completions nest the schema, the responses endpoint does not.
    inner = wanted.object("json_schema") or wanted
    schema = inner.raw("schema")
    if schema is None:
        raise inner.fail("schema", "given as a JSON schema")
    return Schema(schema, inner.path("schema"))


def without_effect(schema: Schema, **others: Any) -> tuple[str, ...]:
    """Warnings: a pinned reply is no run of the block loop, and some options need that loop."""
    return tuple(f"{name} has no effect on a reply in a schema" for name in others if others[name])


def pinned(schema: Schema) -> Source:
    """Fills the schema's holes until the text satisfies it; the last attempt stands as it is."""

    async def source(
        engine: Engine, call: Call, deadline: float
    ) -> AsyncGenerator[Draft | Commit | Ended, None]:
        results: list[Infill] = []
        problem: str | None = None
        started = time.monotonic()
        only = schema.parts[0] if len(schema.parts) == 1 else None
        for attempt in range(ATTEMPTS if only is None else 0):
            results.append(await engine.fill(call, schema.parts, seed_of(call, attempt), deadline))
            problem = schema.problem(results[-1].text)
            if problem is None:
                break
        tokenizer, limit = engine.tokenizer, call.options["max_tokens"]
        text = str(only) if only is not None else results[-1].text
        ids = tokenizer.encode(text)
        cut = len(ids) > limit
        if cut:
            ids = ids[:limit]
            text = tokenizer.decode(ids)
        yield Commit(ids=tuple(ids), text=text, block=max(len(results) - 1, 0))
        notes = (
            ()
            if problem is None
            else (f"after {ATTEMPTS} attempts the reply breaks the schema: {problem}",)
        )
        end = ended(engine, call, results, text, notes, time.monotonic() - started)
        yield replace(end, finish=replace(end.finish, reason="length")) if cut else end

    return source


def called_or_pinned(schema: Schema) -> Source:
    """A reply that calls a tool, or else one in the schema: the model chooses, writing freely."""

    async def source(
        engine: Engine, call: Call, deadline: float
    ) -> AsyncGenerator[Draft | Commit | Ended, None]:
        held: list[Draft | Commit | Ended] = []
        async with contextlib.aclosing(engine.stream(call, deadline)) as events:
            async for event in events:
                held.append(event)
        commits = [event for event in held if isinstance(event, Commit)]
        calls = any(commit.tool_calls or commit.cut_call for commit in commits)
        text = "".join(commit.text for commit in commits)
        if calls or schema.problem(text) is None:
            for event in held:
                yield event
            return
        async with contextlib.aclosing(pinned(schema)(engine, call, deadline)) as events:
            async for event in events:
                yield event

    return source


def between(prompt: str, suffix: str) -> Source:
    """What belongs between two texts, which both stay as they are."""

    async def source(
        engine: Engine, call: Call, deadline: float
    ) -> AsyncGenerator[Draft | Commit | Ended, None]:
        started = time.monotonic()
        result = await engine.fill(call, [prompt, Hole(), suffix], call.options["seed"], deadline)
        (filling,) = result.fillings
        yield Commit(ids=tuple(engine.tokenizer.encode(filling.text)), text=filling.text, block=0)
        yield ended(engine, call, [result], filling.text, (), time.monotonic() - started)

    return source


def ended(
    engine: Engine,
    call: Call,
    results: list[Infill],
    text: str,
    notes: tuple[str, ...],
    seconds: float,
) -> Ended:
    """The account of a reply that one or more fillings gave, which also read the prompt."""
    generated = len(engine.tokenizer.encode(text))
    finish = Finish(
        reason="stop",
        seed=call.options["seed"],
        blocks=len(results),
        steps_per_block=tuple(result.steps for result in results),
        converged=tuple(result.converged for result in results),
        tokens_per_forward=generated / max(sum(result.forwards for result in results), 1),
        prompt_tokens=len(call.prompt_ids),
        generated_tokens=generated,
        prefill_seconds=0.0,
        denoise_seconds=seconds,
        peak_memory_bytes=0,
    )
    engine.metrics.finished(finish, 0)
    return Ended(finish, cached_tokens=0, timed_out=False, notes=notes)
