"""Templates that loop, multiply or break: one sentence each, within time and memory."""

import json
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
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    try:
        said = sandbox.render(TEMPLATES[name], "x", messages=[{"role": "user", "content": "hi"}])
    except (CheckpointError, InputError) as error:
        said = str(error)
    assert isinstance(said, str)
    assert time.thread_time() - started < 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 256 << 20
