"""The rooms of the package: who may import whom, and that no module imports in a circle.

Every import counts: of modules, inside functions, and those that only type checkers read.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the top to the bottom: a room may import those of the lines below it, and itself.
LINES = (
    ("commands",),
    ("cli",),
    ("server",),
    ("benchmark", "evaluation"),
    ("convert",),
    ("runtime",),
    ("infilling", "decisions", "training", "replaying", "scoring"),
    ("generate",),
    ("checkpoint", "context"),
    ("decoding", "demo"),
    ("constraints",),
    ("prompt",),
    ("model",),
    ("distributed",),
    ("kernels",),
    ("model_thread",),
    ("machine",),
    ("headers",),
    ("files",),
    ("untrusted_json",),
    ("errors", "_version", "asyncio_bridge", "__pyinstaller"),
)
RANK = {room: rank for rank, rooms in enumerate(LINES) for room in rooms}
# The modules that `python -m` runs, and the package, whose public names come from everywhere.
COMMANDS = {"__main__", "chat", "decide", "doctor", "infill", "lora", "fuse"}
COMMANDS |= {"completion", "evaluate", "models"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for base, package in (
        (ROOT / "mlx_dgemma", "mlx_dgemma"),
        (ROOT / "convert", "mlx_dgemma.convert"),
    ):
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            if package == "mlx_dgemma" and parts[0] == "convert":
                continue  # a link to convert/
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def is_program(node: ast.stmt) -> bool:
    """Whether this is what only `python -m` runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported(source: str) -> set[str]:
    """The package's modules that a module's text imports, anywhere but where it is the program."""
    found: set[str] = set()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not is_program(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide the room they come from"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name in MODULES}


GRAPH = {
    name: imported(path.read_text(encoding="utf-8")) - {name} for name, path in MODULES.items()
}


def room_of(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 1 or parts[-1] == "__main__" or (len(parts) == 2 and parts[1] in COMMANDS):
        return "commands"
    return parts[1]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_every_module_stands_in_a_room() -> None:
    assert len(MODULES) > 150
    assert sorted({room_of(name) for name in MODULES} - set(RANK)) == []
    assert sorted(set(RANK) - {room_of(name) for name in MODULES}) == []


def test_rooms_import_downwards_alone() -> None:
    wrong = defaultdict(set)
    for name, others in GRAPH.items():
        room = room_of(name)
        for other in others:
            below = room_of(other)
            if below != room and RANK[below] <= RANK[room]:
                wrong[f"{room} -> {below}"].add(f"{name} imports {other}")
    assert dict(wrong) == {}


def test_no_module_imports_in_a_circle() -> None:
    assert circles(GRAPH) == []


def test_the_check_sees_what_it_should() -> None:
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from mlx_dgemma.model import Model
def late():
    from mlx_dgemma.decoding import denoise
    import mlx_dgemma.errors
if __name__ == "__main__":
    import mlx_dgemma.cli
"""
    assert imported(text) == {
        "mlx_dgemma.model",
        "mlx_dgemma.decoding.denoise",
        "mlx_dgemma.errors",
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert RANK["kernels"] > RANK["model"] > RANK["decoding"] > RANK["generate"] > RANK["cli"]


def test_modules_are_short_and_named_once_in_their_room() -> None:
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lengths.items() if count > 400} == {}
    twice = defaultdict(list)
    for name in MODULES:
        room, last = room_of(name), name.split(".")[-1]
        if room != "commands" and last not in ("__main__", room):
            twice[room, last].append(name)
    assert [names for names in twice.values() if len(names) > 1] == []


def test_names_that_repeat_are_told_apart_by_their_rooms() -> None:
    """A verb's file in cli/ and its launcher share a name; a task of the demo has that of what it
    teaches; and what is listed here."""
    rooms = defaultdict(set)
    for name in MODULES:
        if (last := name.split(".")[-1]) not in ("__main__", room_of(name)):
            rooms[last].add(room_of(name))
    found = {last: sorted(where - {"cli", "commands", "demo"}) for last, where in rooms.items()}
    assert {last: where for last, where in found.items() if len(where) > 1} == {
        "attention": ["kernels", "model"],  # a layer, and its fused operation
        "plan": ["checkpoint", "convert", "training"],  # of memory; of a conversion
        "settings": ["decoding", "server", "training"],
    }


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for name, path in MODULES.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not text or len(text.split("\n\n")[0]) < 20:
            silent.append(name)
    assert silent == []
