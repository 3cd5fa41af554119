"""Which tools a reply may call, and replies that must call one.

The beginning of a forced call, `call:name{key:`, is pinned on the canvas; with several tools to
choose from, what their calls share is, and the next token is one of theirs. The rest is denoised
as ever, checked against the tool's parameters, and tried again with new seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from mlx_dgemma.decoding.canvas import Opening
from mlx_dgemma.decoding.events import Commit, Draft
from mlx_dgemma.prompt.messages import check_tools
from mlx_dgemma.prompt.tokenizer import Tokenizer
from mlx_dgemma.prompt.tools import is_argument_name, is_tool_name
from mlx_dgemma.server.attempts import ATTEMPTS, seed_of
from mlx_dgemma.server.engine import Call, Ended, Engine, Source
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.tool_kinds import Declare, Origin
from mlx_dgemma.server.validation import Rules


@dataclass(frozen=True)
class ToolUse:
    """declared: in OpenAI's form, as the model sees them. forced: names of which the reply must
    call one; empty leaves that to the model. one_call: drop every call but the first. origins:
    what functions were that the request declared as something else. warnings: what was left out.
    """

    declared: list[Any] = field(default_factory=list)
    forced: tuple[str, ...] = ()
    one_call: bool = False
    origins: Mapping[str, Origin] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_tools(fields: Fields, declare: Declare, more: Sequence[Any] = ()) -> ToolUse:
    """OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`.

    declare: brings tools to the nested form of chat completions. more: tools of other fields.
    """
    found = declare([*(fields.items("tools") or []), *more])
    use = _chosen(fields, check_tools(found.functions))
    return replace(use, origins=found.origins, warnings=(*found.warnings, *use.warnings))


def _chosen(fields: Fields, declared: list[Any]) -> ToolUse:
    one_call = fields.flag("parallel_tool_calls") is False
    choice = fields.raw("tool_choice")
    if choice == "none":
        return ToolUse()
    if choice in (None, "auto"):
        return ToolUse(declared, (), one_call)
    if choice == "required":
        return force(declared, None, one_call)
    if isinstance(choice, str):
        raise fields.fail("tool_choice", "none, auto, required or an object that names a function")
    entry = Fields(choice, "tool_choice")
    kind = entry.text("type")
    # Chat completions nest what the responses endpoint does not.
    if kind in ("function", "custom", None):
        name = (entry.object(kind or "function") or entry).text("name")
        if name is None:
            raise entry.fail("function.name", "given as a string")
        return force(declared, name, one_call)
    if kind in ("local_shell", "shell"):
        return force(declared, kind, one_call)
    if kind != "allowed_tools":
        left_out = f"tool_choice names {kind}, which this server does not run"
        return ToolUse(declared, (), one_call, warnings=(left_out,))
    allowed = entry.object("allowed_tools") or entry
    mode = allowed.text("mode", ("auto", "required"))
    listed = [Fields(tool, "tool_choice.tools") for tool in allowed.items("tools") or []]
    names = [(tool.object("function") or tool).text("name") for tool in listed]
    declared = [tool for tool in declared if tool["function"]["name"] in names]
    if mode == "required":
        return force(declared, None, one_call)
    return ToolUse(declared, (), one_call)


def force(declared: list[Any], name: str | None, one_call: bool) -> ToolUse:
    """A call of one tool, or of any when name is None; ApiError 400 when there is no such tool."""
    names = [tool["function"]["name"] for tool in declared]
    if not names:
        raise ApiError(400, "tool_choice asks for a call, but tools is empty.", param="tool_choice")
    if name is not None and name not in names:
        raise ApiError(
            400, f"tool_choice names {name!r}, which tools does not declare.", param="tool_choice"
        )
    forced = tuple(dict.fromkeys(names)) if name is None else (name,)
    unreadable = [known for known in forced if not is_tool_name(known)]
    if unreadable:
        raise ApiError(
            400,
            f"tool_choice cannot force {unreadable[0]!r}: a name holds no spaces, quotes or "
            "brackets.",
            param="tool_choice",
        )
    return ToolUse(declared, forced, one_call)


def opening(tokenizer: Tokenizer, tools: Sequence[Any]) -> Opening:
    """How a reply begins that calls one of the tools; ApiError 400 without the markers."""
    if not {"stc", "etc", "escape"} <= tokenizer.ids.keys():
        raise ApiError(400, "tool_choice: this checkpoint has no tool calls.", param="tool_choice")
    rows = [_beginning(tokenizer, tool["function"]) for tool in tools]
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    shared = [column[0] for column in columns]
    following = {row[len(shared)] for row in rows} if min(map(len, rows)) > len(shared) else ()
    return Opening(tuple(shared), tuple(following))


def _beginning(tokenizer: Tokenizer, function: Mapping[str, Any]) -> list[int]:
    """A call up to its first required argument, as the template sorts them, and into a string."""
    start = f"call:{function['name']}{{"
    parameters = function.get("parameters") or {}
    required, properties = parameters.get("required"), parameters.get("properties")
    key, kind = "", None
    if isinstance(required, list) and isinstance(properties, Mapping):
        known = [name for name in required if isinstance(name, str) and is_argument_name(name)]
        key = min(known, key=str.lower, default="")
        described = properties.get(key)
        kind = described.get("type") if isinstance(described, Mapping) else None
    text = f"{start}{key}:" if key else start
    quote = [tokenizer.ids["escape"]] if kind == "string" else []
    return [tokenizer.ids["stc"], *tokenizer.encode(text), *quote]


def forced_call(tokenizer: Tokenizer, use: ToolUse) -> tuple[Source, tuple[str, ...]]:
    """Replies that call a tool with arguments it takes, and warnings: whose cannot be checked.

    The last attempt stands as it is.
    """
    forced = [tool for tool in use.declared if tool["function"]["name"] in use.forced]
    begin = opening(tokenizer, forced)
    rules: dict[str, Rules] = {}
    warnings = []
    for tool in use.declared:
        name, parameters = tool["function"]["name"], tool["function"].get("parameters")
        try:
            rules[name] = Rules(parameters or True, "parameters")
        except ApiError as unknown:
            if name in use.forced:
                why = unknown.message.partition(":")[0]
                warnings.append(f"the arguments of {name} are not checked: {why}")

    def problem(calls: list[dict[str, Any]]) -> str | None:
        for call in calls:
            name, arguments = call["name"], call["arguments"]
            if name not in use.forced:
                return f"{name} is not among the tools to call"
            wrong = rules[name].violation(arguments) if name in rules else None
            if wrong:
                return f"{wrong} in the arguments of {name}"
        return None if calls else "it calls no tool"

    async def source(
        engine: Engine, call: Call, deadline: float
    ) -> AsyncGenerator[Draft | Commit | Ended, None]:
        for attempt in range(ATTEMPTS):
            options = {**call.options, "seed": seed_of(call, attempt), "opening": begin}
            commits: list[Commit] = []
            stream = engine.stream(replace(call, options=options), deadline)
            async with contextlib.aclosing(stream) as events:
                async for event in events:
                    if isinstance(event, Commit):
                        commits.append(event)
                    elif isinstance(event, Draft):
                        yield event
                    else:
                        end = event
            calls = [made for commit in commits for made in commit.tool_calls]
            wrong = problem(calls[:1] if use.one_call else calls)
            # A reply that was cut short would be so again.
            if wrong is None or end.finish.reason != "stop":
                break
        for commit in commits:
            yield commit
        if wrong is not None:
            note = f"after {attempt + 1} attempts the reply is not the call asked for: {wrong}"
            end = replace(end, notes=(*end.notes, note))
        yield end

    return source, tuple(warnings)
