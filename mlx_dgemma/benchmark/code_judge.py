"""Does a function that a model wrote return what it should? Run where it can do no harm.

The code is read first: it may import a few modules of arithmetic and text, and name nothing that
reaches beyond its arguments. Then it runs in a process of its own, in an empty folder, with bounds
of time and memory and without a file to write.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

SECONDS = 5
_MEMORY = 512 << 20
_MODULES = {"collections", "functools", "itertools", "math", "operator", "re", "string", "typing"}
_NAMES = {
    "breakpoint", "compile", "delattr", "eval", "exec", "exit", "getattr", "globals", "help",
    "input", "locals", "memoryview", "open", "quit", "setattr", "vars",
}  # fmt: skip
_MOST = 1 << 16  # characters of code, and of what it answers

_RUN = """
import json, resource, sys
for kind, most in (("RLIMIT_CPU", {seconds}), ("RLIMIT_AS", {memory}), ("RLIMIT_FSIZE", 0)):
    try:
        resource.setrlimit(getattr(resource, kind), (most, most))
    except (ValueError, OSError):
        pass  # macOS bounds no address space
code, inputs = json.load(sys.stdin)
space = {{"__name__": "answer"}}
exec(compile(code, "answer", "exec"), space)
results = [space["f"](given) for given in inputs]
print()
print(json.dumps(results))  # on the last line, after whatever the code prints
"""


def passes(code: str, cases: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the code defines an f that gives every case's second value for its first; both are
    plain JSON. False for code that is refused, fails, or takes too long."""
    if len(code) > _MOST or not is_harmless(code):
        return False
    inputs = [given for given, _ in cases]
    program = _RUN.format(seconds=SECONDS, memory=_MEMORY)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", program],
                input=json.dumps([code, inputs]),
                capture_output=True,
                text=True,
                timeout=2 * SECONDS,
                cwd=folder,
                env={},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    try:
        found = json.loads(done.stdout[-_MOST:].strip().splitlines()[-1])
    except (ValueError, IndexError, RecursionError):
        return False
    if done.returncode != 0:
        return False
    expected = json.loads(json.dumps([result for _, result in cases]))
    return bool(found == expected)


def is_harmless(code: str) -> bool:
    """Whether the code may run: it parses, imports nothing else, and reaches for no internals."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
        else:
            modules = []
        if any(module.split(".")[0] not in _MODULES for module in modules):
            return False
        if isinstance(node, ast.Name) and _reaches_out(node.id):
            return False
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            return False
        if isinstance(node, ast.alias) and node.name.startswith("_"):
            return False
    return True


def _reaches_out(name: str) -> bool:
    return name in _NAMES or (name.startswith("__") and name != "__name__")
