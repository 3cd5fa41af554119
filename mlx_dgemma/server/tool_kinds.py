"""Tools that are no plain functions, declared to the model as functions, and their calls back.

A custom tool is a function with one string, a shell a function with a command, a namespace the
functions inside it. Tools that a provider runs itself (a web search, an image generator) are left
out with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.validation import MOST_SCHEMAS, count_schemas

MAX_TOOLS = 1024
_STRING = {"type": "string"}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


_INPUT = _object({"input": {"type": "string", "description": "the tool's whole input"}}, "input")
_LOCAL_SHELL = _object(
    {
        "command": {"type": "array", "items": _STRING, "description": "the program and arguments"},
        "working_directory": _STRING,
        "timeout_ms": {"type": "integer"},
    },
    "command",
)
_SHELL = _object(
    {
        "commands": {"type": "array", "items": _STRING, "description": "shell commands, in order"},
        "timeout_ms": {"type": "integer"},
        "max_output_length": {"type": "integer"},
    },
    "commands",
)
_BASH = _object({"command": _STRING, "restart": {"type": "boolean"}})
_EDITOR = _object(
    {
        "command": {"type": "string", "enum": ["view", "create", "str_replace", "insert"]},
        "path": _STRING,
        "file_text": _STRING,
        "old_str": _STRING,
        "new_str": _STRING,
        "insert_line": {"type": "integer"},
        "insert_text": _STRING,
        "view_range": {"type": "array", "items": {"type": "integer"}},
    },
    "command",
    "path",
)
# Anthropic's tools that the client runs: how the type begins, what the tool does, its input.
_CLIENT_TOOLS = (
    ("bash_", "Run a shell command.", _BASH),
    ("text_editor_", "View, create and edit files.", _EDITOR),
)


@dataclass(frozen=True)
class Origin:
    """What a declared function was in the request. kind: function, custom, local_shell, shell."""

    kind: str
    name: str
    namespace: str | None = None


@dataclass
class Declared:
    """Functions in OpenAI's nested form, where each came from, and what was left out.

    skipped: names of the tools left out, or their types where they have none.
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(
        self, name: Any, description: Any, parameters: Any, origin: Origin | None = None
    ) -> None:
        function = {"name": name, "description": description or "", "parameters": parameters or {}}
        self.functions.append({"type": "function", "function": function})
        if origin is not None and isinstance(name, str):
            self.origins[name] = origin

    def skip(self, kind: str, name: Any = None) -> None:
        self.skipped.append(name if isinstance(name, str) else kind)
        self.warnings.append(
            f"a tool of type {kind} was left out: this server runs no tools itself"
        )


def check_count(found: Declared) -> None:
    """ApiError 400 for more functions, or larger ones, than anyone reads."""
    if len(found.functions) > MAX_TOOLS:
        why = f"The request has {len(found.functions)} tools; {MAX_TOOLS} are the most."
        raise ApiError(400, why, param="tools")
    schemas = 0
    for function in found.functions:
        schemas += count_schemas(function)
        if schemas > MOST_SCHEMAS:
            why = (
                f"The request's tools have more than {MOST_SCHEMAS:,} schemas in their parameters."
            )
            raise ApiError(400, why, param="tools")


Declare = Callable[[list[Any]], Declared]


def chat_tools(tools: list[Any]) -> Declared:
    """Chat completions: nested functions and custom tools."""
    found = Declared()
    for i, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind == "custom":
            entry = Fields(tool, f"tools[{i}]")
            _custom(found, entry.object("custom") or entry)
        elif isinstance(kind, str) and kind != "function":
            found.skip(kind)
        else:
            found.functions.append(tool)
    return found


def responses_tools(tools: list[Any], where: str = "tools") -> Declared:
    """Responses: flat functions, custom tools, namespaces of both, and shells."""
    found = Declared()
    for i, tool in enumerate(tools):
        _responses_tool(found, Fields(tool, f"{where}[{i}]"), None)
    return found


def _responses_tool(found: Declared, tool: Fields, namespace: str | None) -> None:
    kind = tool.text("type") or "function"
    if kind == "function":
        name = _name(tool)
        declared = name if namespace is None else f"{namespace}{_joint(namespace)}{name}"
        origin = None if namespace is None else Origin(kind, name, namespace)
        found.add(declared, tool.text("description"), _schema(tool, "parameters"), origin)
    elif kind == "custom":
        _custom(found, tool, namespace)
    elif kind == "namespace" and namespace is None:
        name = _name(tool)
        for j, inner in enumerate(tool.items("tools") or []):
            _responses_tool(found, Fields(inner, tool.path(f"tools[{j}]")), name)
    elif kind == "local_shell":
        found.add(kind, "Run a program.", _LOCAL_SHELL, Origin(kind, kind))
    elif kind == "shell" and _runs_at_the_client(tool):
        found.add(kind, "Run shell commands.", _SHELL, Origin(kind, kind))
    else:
        found.skip(kind)


def _name(tool: Fields) -> str:
    name = tool.text("name")
    if not name:
        raise tool.fail("name", "a non-empty string")
    return name


def _schema(tool: Fields, name: str) -> Any:
    """The parameters, by the dialect's name for them; ApiError 400 for what is no object."""
    schema = tool.raw(name)
    if not isinstance(schema, Mapping | None):
        raise tool.fail(name, "a JSON schema object")
    return schema


def _runs_at_the_client(tool: Fields) -> bool:
    environment = tool.object("environment")
    return environment is None or environment.text("type") == "local"


def _custom(found: Declared, tool: Fields, namespace: str | None = None) -> None:
    """A tool that takes free text; a grammar for it is described, not enforced."""
    name, description = _name(tool), tool.text("description") or ""
    form = tool.raw("format")
    grammar = form.get("grammar", form) if isinstance(form, Mapping) else None
    definition = grammar.get("definition") if isinstance(grammar, Mapping) else None
    if isinstance(definition, str):
        description = f"{description}\nThe input follows this grammar:\n{definition}".strip()
        found.warnings.append(f"the grammar of {name} is described to the model, not enforced")
    declared = name if namespace is None else f"{namespace}{_joint(namespace)}{name}"
    found.add(declared, description, _INPUT, Origin("custom", name, namespace))


def _joint(namespace: str) -> str:
    return "" if namespace.endswith(("__", ".")) else "__"


def anthropic_tools(tools: list[Any]) -> Declared:
    """Messages: tools with an input schema, and the two of Anthropic's that the client runs."""
    found = Declared()
    for i, tool in enumerate(tools):
        entry = Fields(tool, f"tools[{i}]")
        kind = entry.text("type")
        known = next((t for t in _CLIENT_TOOLS if kind and kind.startswith(t[0])), None)
        if kind in (None, "custom"):
            schema = _schema(entry, "input_schema")
            found.add(_name(entry), entry.text("description"), schema)
        elif known is not None:
            found.add(_name(entry), known[1], known[2])
        else:
            found.skip(kind, entry.raw("name"))
    return found


def call_item(origin: Origin | None, name: str, arguments: str) -> dict[str, Any]:
    """The fields by which a Responses item names a call: its type, its tool and its input."""
    if origin is None:
        return {"type": "function_call", "name": name, "arguments": arguments}
    if origin.kind in ("local_shell", "shell"):
        given = json.loads(arguments or "{}")
        if origin.kind == "shell":
            return {"type": "shell_call", "action": given}
        action = {"type": "exec", "env": {}, "command": [], **given}
        return {"type": "local_shell_call", "action": action}
    named = {"name": origin.name}
    if origin.namespace is not None:
        named["namespace"] = origin.namespace
    if origin.kind == "custom":
        return {"type": "custom_tool_call", **named, "input": custom_input(arguments)}
    return {"type": "function_call", **named, "arguments": arguments}


def custom_input(arguments: str) -> str:
    """The string a custom tool gets, from the arguments of the function it was declared as."""
    given = json.loads(arguments or "{}")
    value = given.get("input", "") if isinstance(given, dict) else given
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def declared_name(name: Any, namespace: Any) -> Any:
    """The name under which a namespace's function was declared to the model."""
    if isinstance(name, str) and isinstance(namespace, str) and namespace:
        return f"{namespace}{_joint(namespace)}{name}"
    return name
