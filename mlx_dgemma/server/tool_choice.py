"""Which tools a reply may call, and replies that must call one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_dgemma.prompt.messages import check_tools
from mlx_dgemma.prompt.tools import is_tool_name
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.tool_kinds import Declare, Origin, check_count


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
    check_count(found)
    use = _chosen(fields, check_tools(found.functions), found.skipped)
    return replace(use, origins=found.origins, warnings=(*found.warnings, *use.warnings))


def _chosen(fields: Fields, declared: list[Any], skipped: Sequence[str]) -> ToolUse:
    one_call = fields.flag("parallel_tool_calls") is False
    choice = fields.raw("tool_choice")
    if choice == "none":
        return ToolUse()
    if choice in (None, "auto"):
        return ToolUse(declared, (), one_call)
    if choice == "required":
        return force(declared, None, one_call, skipped)
    if isinstance(choice, str):
        raise fields.fail("tool_choice", "none, auto, required or an object that names a function")
    entry = Fields(choice, "tool_choice")
    kind = entry.text("type")
    # Chat completions nest what the responses endpoint does not.
    if kind in ("function", "custom", None):
        name = (entry.object(kind or "function") or entry).text("name")
        if name is None:
            raise entry.fail("function.name", "given as a string")
        return force(declared, name, one_call, skipped)
    if kind in ("local_shell", "shell"):
        return force(declared, kind, one_call)
    if kind != "allowed_tools":
        raise _runs_elsewhere([kind])
    allowed = entry.object("allowed_tools") or entry
    mode = allowed.text("mode", ("auto", "required"))
    listed = [Fields(tool, "tool_choice.tools") for tool in allowed.items("tools") or []]
    names = [(tool.object("function") or tool).text("name") for tool in listed]
    declared = [tool for tool in declared if tool["function"]["name"] in names]
    if mode == "required":
        return force(declared, None, one_call, skipped)
    return ToolUse(declared, (), one_call)


def force(
    declared: list[Any], name: str | None, one_call: bool, skipped: Sequence[str] = ()
) -> ToolUse:
    """A call of one tool, or of any when name is None; ApiError 400 when there is no such tool.

    skipped: tools that the provider of a model would run, by name.
    """
    names = [tool["function"]["name"] for tool in declared]
    if name in skipped or (skipped and not names):
        raise _runs_elsewhere(skipped if name is None else [name])
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


def _runs_elsewhere(names: Sequence[str]) -> ApiError:
    return ApiError(
        400,
        f"tool_choice asks for {' or '.join(names)}, which this server does not run itself: "
        "declare a function in its place.",
        param="tool_choice",
    )
