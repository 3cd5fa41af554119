"""Templates that loop, multiply or break: one sentence each, within time and memory."""

import json
import os
import random
import re
import resource
import sys
import time
from pathlib import Path

import pytest

from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.prompt import sandbox

# A name and a template on each line; @text*9@ stands for the text nine times.
FILE = Path(__file__).with_name("hostile_templates.txt")
TEMPLATES = {
    name: re.sub(r"@(.+?)\*(\d+)@", lambda many: many[1] * int(many[2]), json.loads(text))
    for name, text in (line.split("\t") for line in FILE.read_text().splitlines())
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_rendered_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    _rendered(TEMPLATES[name])


def test_random_templates_are_rendered_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops, macros, allocation and errors of every kind, put together at random.

    MLX_DGEMMA_TEMPLATES sets how many, MLX_DGEMMA_HOSTILE_SEED which.
    """
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    rng = random.Random(int(os.environ.get("MLX_DGEMMA_HOSTILE_SEED", "1")))
    count = int(os.environ.get("MLX_DGEMMA_TEMPLATES", "120"))
    refused = sum(_rendered(template(rng)) is None for _ in range(count))
    assert count // 5 < refused < count


EXPRESSIONS = (
    *("1", "0", "-1", "'a'", "none", "true", "missing", "messages", "messages[0]", "[1, 2]", "{}"),
    *("1.5", "range(9)", "range(999999999)", "'ab' * 99", "namespace(a=1)", "messages[9].x.y"),
    *("9 ** 9", "strftime_now('%Y')", "raise_exception('no')", "loop", "self", "cycler(1, 2)"),
)
OPERATORS = ("+", "*", "**", "%", "~", "//", "/", "-", "and", "in", "==", "<", "is defined or")
FILTERS = (
    *("length", "list", "join('x')", "upper", "tojson", "replace('a', 'bbbb')", "indent(99999)"),
    *("center(9999999)", "batch(3)|list", "sort", "map('upper')|list", "int", "string", "first"),
    *(
        "format(1)",
        "xmlattr",
        "pprint",
        "wordwrap(1)",
        "sum",
        "unique|list",
        "attr('x')",
        "nothing",
    ),
)


def expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(EXPRESSIONS)
    inner = f"({expression(rng, depth - 1)})"
    what = rng.randrange(4)
    if what == 0:
        return f"{inner} {rng.choice(OPERATORS)} ({expression(rng, depth - 1)})"
    if what == 1:
        return f"{inner}|{rng.choice(FILTERS)}"
    if what == 2:
        return f"{inner}{rng.choice(('[0]', '.x', '[-1]', '.items()', '.__class__', '()'))}"
    return f"[{inner}, {inner}]"


def template(rng: random.Random, depth: int = 4) -> str:
    """Jinja of a few hundred characters, mostly sound."""
    if depth == 0:
        return f"{{{{ {expression(rng, 3)} }}}}"
    inner = template(rng, depth - 1)
    kinds = (
        f"{{% for a in {expression(rng, 2)} %}}{inner}{{% endfor %}}",
        f"{{% for a in range({rng.choice((3, 99, 10**6, 10**10))}) %}}{inner}{{% endfor %}}",
        f"{{% if {expression(rng, 2)} %}}{inner}{{% else %}}{template(rng, 0)}{{% endif %}}",
        f"{{% set a = {expression(rng, 3)} %}}{inner}{{{{ a }}}}",
        f"{{% macro m(a) %}}{inner}{{{{ m(a) if a else 1 }}}}{{% endmacro %}}{{{{ m(1) }}}}",
        f"{{% set a %}}{inner}{{% endset %}}{{{{ a * 999 }}}}",
        f"{inner}{inner}",
        inner + rng.choice(("{%", "}}", "{{ a b }}", "{% end %}", "{# ", "{% break %}", "")),
    )
    return rng.choice(kinds)


def _rendered(source: str) -> str | None:
    """What a template says; None where it is refused in one sentence."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    said = why = None
    try:
        said = sandbox.render(source, "x", messages=[{"role": "user", "content": "hi"}])
    except (CheckpointError, InputError) as error:
        why = str(error)
    assert why is None or why.endswith("."), source
    assert time.thread_time() - started < 5, source
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 256 << 20, source
    return said
