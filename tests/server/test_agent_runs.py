"""Agents' programs, unmodified, let loose on a small project: each reads a file and fixes it.

The words of the model are scripted by what the prompt holds; the program, its tools, the socket
and the server are real. test_agent_programs.py replays what they sent.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_dgemma.prompt.encode import encode_prompt

from .client_scripts import serving
from .conftest import Script, config, tokenizer

PROGRAMS = Path(__file__).parent / "agents"
BROKEN, FIXED = "def add(a, b):\n    return a - b\n", "def add(a, b):\n    return a + b\n"
WRONG, RIGHT = "    return a - b", "    return a + b"
PATCH = (
    "apply_patch <<'EOF'\n*** Begin Patch\n*** Update File: calc.py\n@@\n def add(a, b):\n"
    f"-{WRONG}\n+{RIGHT}\n*** End Patch\nEOF"
)
TASK, ANSWER = "Fix calc.py", "add is fixed."
CODEX = """model = "default"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "ADDRESS/v1"
wire_api = "responses"
"""
CONTINUE = """name: Local
version: 1.0.0
schema: v1
models:
  - {name: local, provider: openai, model: default, apiBase: ADDRESS/v1, apiKey: none}
"""
OPENCODE = json.dumps(
    {
        "model": "local/default",
        "autoupdate": False,
        "share": "disabled",
        "provider": {
            "local": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": "ADDRESS/v1", "apiKey": "none"},
                "models": {"default": {"limit": {"context": 200_000, "output": 4096}}},
            }
        },
    }
)
pytestmark = pytest.mark.slow


def call(name: str, **arguments: str) -> str:
    inner = ",".join(f'{key}:<|"|>{value}<|"|>' for key, value in arguments.items())
    return f"<|tool_call>call:{name}{{{inner}}}<tool_call|>"


@dataclass(frozen=True)
class Program:
    """arguments: before the task. files: of an empty home, ADDRESS in the place of the server's.
    steps: what reads and fixes the project's file, FILE in the place of its path."""

    arguments: tuple[str, ...]
    files: dict[str, str]
    steps: tuple[str, str]


CODEX_FLAGS = ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
CLAUDE_FLAGS = ("--model", "claude-sonnet-4-5", "--allowedTools", "Read,Edit", "-p")
PROGRAM = {
    "codex": Program(
        CODEX_FLAGS,
        {".codex/config.toml": CODEX},
        (call("exec_command", cmd="cat calc.py"), call("exec_command", cmd=PATCH)),
    ),
    "claude": Program(
        CLAUDE_FLAGS,
        {},
        (
            call("Read", file_path="FILE"),
            call("Edit", file_path="FILE", new_string=RIGHT, old_string=WRONG),
        ),
    ),
    "opencode": Program(
        ("run",),
        {".config/opencode/opencode.json": OPENCODE},
        (
            call("read", filePath="FILE"),
            call("edit", filePath="FILE", newString=RIGHT, oldString=WRONG),
        ),
    ),
    "cn": Program(
        ("--config", "HOME/config.yaml", "--auto", "-p"),
        {"config.yaml": CONTINUE},
        (
            call("Read", filepath="FILE"),
            call("Edit", file_path="FILE", new_string=RIGHT, old_string=WRONG),
        ),
    ),
}


class Answering(Script):
    """A script that takes its next step by what the prompt holds, in a context for agents."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__(ANSWER, block=32)
        text = replace(config().text, max_position_embeddings=1 << 18)
        self.model = SimpleNamespace(config=replace(config(), text=text))
        self.steps = [*steps, ANSWER]

    def submit(self, prompt: Any, deliver: Callable[[Any], None], **options: Any) -> Any:
        text = tokenizer().decode(encode_prompt(self.tokenizer, prompt, tools=options.get("tools")))
        done = text[text.rfind(TASK) :].count("<|tool_response>")
        # Without tools it is asked for a title.
        self.replies = [self.steps[done] if options.get("tools") else ANSWER]
        return super().submit(prompt, deliver, **options)


@pytest.mark.parametrize("name", PROGRAM)
def test_a_program_reads_and_mends_a_file(name: str, tmp_path: Path) -> None:
    executable = PROGRAMS / "node_modules" / ".bin" / name
    if not executable.exists():
        pytest.skip(f"{name} is not installed: npm install --prefix {PROGRAMS}")
    program, home, file = PROGRAM[name], tmp_path / "home", tmp_path / "project" / "calc.py"
    file.parent.mkdir()
    file.write_text(BROKEN)
    script = Answering([step.replace("FILE", str(file)) for step in program.steps])
    with serving(script, max_prompt_tokens=None) as url:
        for path, content in program.files.items():
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_text(content.replace("ADDRESS", url))
        home.mkdir(exist_ok=True)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": "none",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CONTINUE_TELEMETRY_ENABLED": "0",
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
            "OPENCODE_DISABLE_AUTOUPDATE": "1",
        }
        arguments = [argument.replace("HOME", str(home)) for argument in program.arguments]
        done = subprocess.run(
            [str(executable), *arguments, TASK],
            cwd=file.parent, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
    assert ANSWER in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0
    assert file.read_text() == FIXED
