"""A pipe, a folder, a socket or a device where a flag wants a file: exit code 2 at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlx_dgemma.__main__ import main
from mlx_dgemma.errors import InputError
from mlx_dgemma.files import read_argument

HOLD = ["--max-tokens", "4"]
FLAGS = {
    "prompt file": ["generate", "--prompt-file"],
    "replay": ["generate", "--replay"],
    "image": ["generate", "--prompt", "a", "--image"],
    "schema": ["generate", "--prompt", "a", "--json-schema"],
    "template": ["generate", "--prompt", "a", "--chat-template"],
    "text": ["infill", "--file"],
    "state": ["decide", "--question", "a", "--state-file"],
    "questions": ["decide", "--state", "a", "--questions"],
    "config": ["lora", "--train", "--config"],
}


@pytest.mark.parametrize("flag", FLAGS)
def test_what_is_no_file_is_refused_at_once(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    for name in ("pipe", "folder", "socket", "/dev/zero", "missing"):
        try:
            code = main([*FLAGS[flag], name])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr().err
        assert code == 2, (name, said)
        assert "Traceback" not in said
        assert name in said
        assert said.strip().endswith("."), (name, said)


def test_what_the_shell_opened_is_read_to_its_end() -> None:
    """`--prompt-file <(command)` and `/dev/stdin` are pipes that someone writes."""
    reading, writing = os.pipe()
    os.write(writing, "Reverse the letters é".encode())
    os.close(writing)
    try:
        assert read_argument(f"/dev/fd/{reading}") == "Reverse the letters é"
        with (
            open("/dev/zero", "rb") as endless,
            pytest.raises(InputError, match=r"larger than 100 bytes"),
        ):
            read_argument(f"/dev/fd/{endless.fileno()}", most=100)
    finally:
        os.close(reading)
