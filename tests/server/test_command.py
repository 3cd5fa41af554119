"""`mlx_dgemma.server` from the shell: flags, refusals, a start and a calm end."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from mlx_dgemma.cli import server
from mlx_dgemma.errors import InputError
from mlx_dgemma.runtime import Runtime
from mlx_dgemma.server.settings import ServerSettings

from .conftest import user


def test_flags_become_settings() -> None:
    arguments = server.build_parser().parse_args(
        ["--port", "9", "--api-key", "k", "--host", "0.0.0.0", "--max-body-mb", "2",
         "--prefix-cache-mb", "0", "--cors-origin", "https://a.example", "--max-tokens", "5"]
    )  # fmt: skip
    settings = server._settings(arguments)
    assert (settings.port, settings.api_key, settings.host) == (9, "k", "0.0.0.0")
    assert (settings.max_body_bytes, settings.prefix_cache_bytes) == (2 << 20, 0)
    assert settings.cors_origins == ("https://a.example",)
    assert (settings.max_output_tokens, settings.max_concurrent) == (5, 4)
    assert settings.model_name == "demo"
    assert settings.kv_bits is None
    packed = server._settings(server.build_parser().parse_args(["--kv-bits", "8"]))
    assert packed.kv_bits == 8
    with pytest.raises(InputError, match="kv_bits=4 is not possible: use 8"):
        ServerSettings(kv_bits=4)
    with pytest.raises(InputError, match="preset='fast' is not known"):
        ServerSettings(**json.loads('{"preset": "fast"}'))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "set an API key"),
        (["--max-concurrent", "0"], "max_concurrent=0 is not possible"),
        (["--max-seconds", "0"], "max_seconds=0.0 is not possible"),
        (["--max-prompt-tokens", "-1"], "max_prompt_tokens=-1 is not possible"),
        (["--port", "99999"], "port=99999 is not possible"),
        (["--port", "0", "--model", "/no/such/folder"], "/no/such/folder"),
        (["--host", "192.0.2.1", "--api-key", "k"], "Cannot listen on 192.0.2.1 ("),
    ],
)
def test_mistakes_are_one_sentence(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    assert server.main(flags) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


@pytest.mark.parametrize("listening", [True, False])
def test_a_port_in_use_is_found_before_anything_is_loaded_or_announced(
    listening: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listening:
            other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(Runtime, "__init__", lambda *_, **__: pytest.fail("loaded"))
        assert server.main(["--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: Port {port} of 127.0.0.1 is in use: choose another")
    assert error.count("\n") == 1


def test_it_starts_and_ends_when_asked(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlx_dgemma", "server", "--port", "0"]
    command += ["--prompt-cache-dir", str(tmp_path / "contexts")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        errors = ""
        while not (address := re.search(r"at (http://127\.0\.0\.1:\d+)/v1\n", errors)):
            errors += process.stderr.readline()
            assert process.poll() is None, errors
        url = address[1]
        assert httpx2.get(f"{url}/health", timeout=99).json()["status"] == "ok"
        asked = {"messages": user("Reverse: " + "abc " * 20), "max_tokens": 4, "canvas_length": 4}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=asked, timeout=99)
        assert answer.status_code == 200
        assert not list((tmp_path / "contexts").iterdir())
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        errors += process.stderr.read()
    finally:
        process.kill()
    assert errors.count("The demo checkpoint needs") == 1  # the memory plan
    assert "Traceback" not in errors
    assert process.returncode == 130
    # What was read is there for the next start.
    assert list((tmp_path / "contexts").glob("context-*.safetensors"))
