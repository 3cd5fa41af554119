"""Replies held to a language: `response_format`, `structured_outputs`, calls of tools; `suffix`.

The canvas is conditioned on the language, so a reply that ends by itself is in it. What a schema
asks for that no automaton can hold is checked afterwards, and a breach is reported as a warning.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlx_dgemma.constraints import Constraint, Language, LanguageError, ToolCalls
from mlx_dgemma.decoding.events import Commit, Draft, Finish
from mlx_dgemma.infilling import Infill
from mlx_dgemma.prompt.holes import Hole
from mlx_dgemma.server.engine import Call, Ended, Engine, Source
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.tool_choice import ToolUse
from mlx_dgemma.server.validation import MOST_SCHEMAS, Rules, UnjudgedError
from mlx_dgemma.untrusted_json import UntrustedJSONError, parse


@dataclass(frozen=True)
class Wanted:
    """What a reply must be. where: the field that says so. rules: of a JSON schema."""

    constraint: Constraint
    where: str
    rules: Rules | None = None

    @classmethod
    def schema(cls, schema: Any, where: str) -> Wanted:
        """ApiError 400 for what is no schema."""
        rules = Rules(schema, where)
        return cls(Constraint.json_schema(rules.root), where, rules)


# A schema is checked only when this is called, which takes long enough to be done elsewhere than on
# the event loop.
Form = Callable[[], Wanted]


def read_format(fields: Fields | None, name: str = "response_format") -> Form | None:
    """None for plain text; ApiError 400 for a format that is none."""
    wanted = None if fields is None else fields.object(name)
    if fields is None or wanted is None:
        return None
    kind = wanted.text("type")
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return partial(Wanted, Constraint.json_object(), fields.path(name))
    # Chat completions nest the schema, the responses endpoint does not.
    inner = wanted.object("json_schema") or wanted
    schema = inner.raw("schema")
    if schema is None:
        nested = name == "response_format" and inner is wanted
        raise inner.fail("json_schema.schema" if nested else "schema", "given as a JSON schema")
    return partial(Wanted.schema, schema, inner.path("schema"))


def read_outputs(fields: Fields) -> Form | None:
    """vLLM's `structured_outputs`: one of regex, choice and json."""
    wanted = fields.object("structured_outputs")
    if wanted is None:
        return None
    given = {name: value for name in ("regex", "choice", "json")
             if (value := wanted.raw(name)) is not None}  # fmt: skip
    if len(given) != 1:
        raise fields.fail("structured_outputs", "an object with one of regex, choice and json")
    ((name, value),) = given.items()
    where = wanted.path(name)
    if name == "json":
        return partial(_written, value, where)
    kind = Constraint.regex if name == "regex" else Constraint.choice
    return partial(Wanted, kind(value), where)


def _written(schema: Any, where: str) -> Wanted:
    """A schema that may be a text."""
    if isinstance(schema, str):
        try:
            schema = parse(schema)
        except UntrustedJSONError as error:
            why = f"{where} must be a JSON schema, or one written as a string: it {error}."
            raise ApiError(400, why, param=where) from error
    return Wanted.schema(schema, where)


async def compiled(engine: Engine, constraint: Constraint, where: str) -> Language:
    """The language for the engine's vocabulary, made off the event loop; ApiError 400."""
    size = engine.runtime.model.config.text.vocab_size
    try:
        return await asyncio.to_thread(constraint.language, engine.tokenizer, size)
    except LanguageError as error:
        raise ApiError(400, f"{where}: {error}", param=where) from None


async def settled(form: Form | None) -> Wanted | None:
    """What a reply must be, its schema checked off the event loop; ApiError 400."""
    return None if form is None else await asyncio.to_thread(form)


async def held(
    engine: Engine, wanted: Wanted | None, tools: ToolUse
) -> tuple[Language | None, Source | None, tuple[str, ...]]:
    """The language of a reply, what checks it afterwards, and warnings.

    With tools beside a format the reply is calls or in the format; with tools alone, calls come
    inside free text, and their arguments fit the tools.
    """
    if not tools.declared and wanted is None:
        return None, None, ()
    if tools.declared and wanted is not None and wanted.constraint.kind == "json_object":
        wanted = Wanted.schema({"type": "object"}, wanted.where)  # a call is possible beside it
    if not tools.declared or (wanted is not None and wanted.rules is None and not tools.forced):
        assert wanted is not None
        language = await compiled(engine, wanted.constraint, wanted.where)
        return language, _checked(language, wanted, ()), ()
    markers = {"stc", "etc", "escape"} <= engine.tokenizer.ids.keys()
    if not markers:
        if tools.forced:
            why = "tool_choice: this checkpoint has no tool calls."
            raise ApiError(400, why, param="tool_choice")
        return None, None, ()
    chosen = [t["function"] for t in tools.declared
              if not tools.forced or t["function"]["name"] in tools.forced]  # fmt: skip
    rules, warnings = await asyncio.to_thread(_parameters, chosen)
    format_ = wanted if wanted is not None and not tools.forced else None
    calls = ToolCalls(
        tuple((name, {} if one.root is True else one.root) for name, one in rules),
        forced=bool(tools.forced) or format_ is not None,
        one=tools.one_call,
        otherwise=None if format_ is None or format_.rules is None else format_.rules.root,
    )
    try:
        language = await compiled(engine, Constraint.tool_calls(calls), "tools")
    except ApiError as error:
        if tools.forced or format_ is not None:
            raise
        return None, None, (*warnings, f"calls are not held to the tools: {error.message}")
    return language, _checked(language, format_, rules), tuple(warnings)


def _parameters(functions: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, Rules]], list[str]]:
    """The rules of every function's arguments, and warnings of those that have none."""
    rules, warnings = [], []
    free, left = Rules(True, "parameters"), MOST_SCHEMAS
    for function in functions:
        try:
            one = free
            if function.get("parameters"):
                one = Rules(function["parameters"], "parameters", left)
                left -= one.size
        except ApiError as unknown:
            why = unknown.message.partition(":")[0]
            warnings.append(f"the arguments of {function['name']} are not checked: {why}")
        rules.append((function["name"], one))
    return rules, warnings


def _checked(
    language: Language, wanted: Wanted | None, tools: Sequence[tuple[str, Rules]]
) -> Source | None:
    """The block loop, and a check of what the language leaves open; None where that is nothing."""
    if not language.unchecked:
        return None

    async def source(
        engine: Engine, call: Call, deadline: float
    ) -> AsyncGenerator[Draft | Commit | Ended, None]:
        text = ""
        calls: list[dict[str, Any]] = []
        async with contextlib.aclosing(engine.stream(call, deadline)) as events:
            async for event in events:
                if isinstance(event, Commit):
                    text += event.text
                    calls += event.tool_calls
                if isinstance(event, Ended) and event.finish.reason == "stop":
                    wrong = await asyncio.to_thread(_breach, text, calls, wanted, dict(tools))
                    if wrong is not None:
                        event = replace(event, notes=(*event.notes, wrong))
                yield event

    return source


def _breach(
    text: str, calls: list[dict[str, Any]], wanted: Wanted | None, tools: dict[str, Rules]
) -> str | None:
    what = "the reply was not checked against its schema"
    try:
        for call in calls:
            what = f"the arguments of {call['name']} were not checked against its parameters"
            rules = tools.get(call["name"])
            wrong = None if rules is None else rules.violation(call["arguments"])
            if wrong is not None:
                return f"the arguments of {call['name']} break its parameters: {wrong}"
        if calls or wanted is None or wanted.rules is None:
            return None
        wrong = wanted.rules.violation(parse(text))
    except UnjudgedError as why:
        return f"{what}: {why}"
    except ValueError:
        wrong = "it is not valid JSON"
    return None if wrong is None else f"the reply breaks the schema: {wrong}"


def between(prompt: str, suffix: str, constraint: Constraint | None) -> Source:
    """What belongs between two texts, which both stay as they are, held to a constraint."""

    async def source(
        engine: Engine, call: Call, deadline: float
    ) -> AsyncGenerator[Draft | Commit | Ended, None]:
        started, hole = time.monotonic(), Hole(constraint=constraint)
        result = await engine.fill(call, [prompt, hole, suffix], call.options["seed"], deadline)
        (filling,) = result.fillings
        yield Commit(ids=tuple(engine.tokenizer.encode(filling.text)), text=filling.text, block=0)
        yield _ended(engine, call, result, filling.text, time.monotonic() - started)

    return source


def _ended(engine: Engine, call: Call, result: Infill, text: str, seconds: float) -> Ended:
    """The account of a reply that a filling gave, which also read the prompt."""
    generated = len(engine.tokenizer.encode(text))
    finish = Finish(
        reason="stop",
        seed=call.options["seed"],
        blocks=1,
        steps_per_block=(result.steps,),
        converged=(result.converged,),
        tokens_per_forward=generated / max(result.forwards, 1),
        prompt_tokens=len(call.prompt_ids),
        generated_tokens=generated,
        prefill_seconds=0.0,
        denoise_seconds=seconds,
        peak_memory_bytes=0,
    )
    engine.metrics.finished(finish, 0)
    return Ended(finish, cached_tokens=0, timed_out=False)
