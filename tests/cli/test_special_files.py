"""A pipe, a folder, a socket or a device where a flag wants a file: exit code 2 at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlx_dgemma.__main__ import main
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import InputError
from mlx_dgemma.files import read_argument, read_bytes

HOLD = ["--max-tokens", "4"]
FLAGS = {
    "prompt file": ["generate", "--prompt-file"],
    "replay": ["generate", "--replay"],
    "image": ["generate", "--prompt", "a", "--image"],
    "schema": ["generate", "--prompt", "a", "--json-schema"],
    "text": ["infill", "--file"],
    "rules": ["convert", "--hf-path", str(CHECKPOINT), "--q-rules-file"],
    "chat template": ["generate", "--prompt", "a", "--chat-template"],
    "state": ["decide", "--question", "a", "--state-file"],
    "questions": ["decide", "--state", "a", "--questions"],
    "report": ["lora", "--train", "--data", ".", "--report"],
    "plot": ["benchmark", "--plot"],
    "benchmark report": ["benchmark", "--report"],
    "config": ["lora", "--train", "--config"],
}
WRITTEN = ("report", "plot", "benchmark report")


@pytest.mark.parametrize("flag", FLAGS)
def test_what_is_no_file_is_refused_at_once(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    unwritten = () if flag in WRITTEN else ("missing",)
    for name in ("pipe", "folder", "socket", "/dev/zero", *unwritten):
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


def test_a_file_of_the_kernel_without_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as /proc/kmsg, which calls itself a regular file and waits for the next message."""
    monkeypatch.setattr("mlx_dgemma.files._kind", lambda mode: None)
    reading, writing = os.pipe()
    try:
        os.set_blocking(reading, False)
        with pytest.raises(OSError, match="it has no data yet"):
            read_bytes(f"/dev/fd/{reading}", 100)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/a.txt", "loop"])
def test_a_home_of_nobody_and_a_loop_of_links_are_names_as_others(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    ask = ["generate", "--prompt", "a", "--max-tokens", "1"]
    dry = ["convert", "--hf-path", str(CHECKPOINT), "--dry-run", "--mlx-path"]
    for argv in ([*ask, "--chat-template"], [*ask, "--trace"], dry):
        try:
            code = main([*argv, name])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr().err
        if argv is dry and name != "loop":  # a folder of that name can be made
            assert code == 0, said
            continue
        assert code == 2, (argv, said)
        assert said.strip().endswith("."), said
    assert os.path.islink("loop")
