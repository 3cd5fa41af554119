"""What a flag is when it is not given: the variable, the file, and what both may not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_dgemma.__main__ import main
from mlx_dgemma.cli import benchmark, generate, server
from mlx_dgemma.cli.defaults import config_file
from mlx_dgemma.errors import InputError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("")
    monkeypatch.setenv("MLX_DGEMMA_CONFIG", str(path))
    monkeypatch.delenv("MLX_DGEMMA_MODEL", raising=False)
    return path


def test_the_file_is_where_such_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_DGEMMA_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_file() == tmp_path / "mlx_dgemma" / "config.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_file() == tmp_path / ".config" / "mlx_dgemma" / "config.toml"
    assert generate.build_parser().parse_args([]).model is None  # there is no file


def test_a_flag_wins_over_the_variable_and_that_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('model = "4bit"\npreset = "balanced"\ntemp = 0.5\n[server]\nport = 9000\n')
    given = server.build_parser().parse_args([])
    assert (given.model, given.port, given.preset) == ("4bit", 9000, "balanced")
    assert generate.build_parser().parse_args([]).temp == 0.5
    monkeypatch.setenv("MLX_DGEMMA_MODEL", "8bit")
    assert generate.build_parser().parse_args([]).model == "8bit"
    assert generate.build_parser().parse_args(["--model", "mine"]).model == "mine"
    # What names its own model, or none, is not contradicted.
    assert generate.build_parser().parse_args(["--demo", "json"]).model is None
    assert benchmark.build_parser().parse_args(["--synthetic=medium"]).model is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model = ", "cannot be read"),
        ("modell = 'a'", "modell is no flag that commands share"),
        ("[serve]\nport = 1", "there is no command serve"),
        ("[generate]\nport = 1", "mlx_dgemma.generate has no flag --port"),
        ("temp = 'warm'", "invalid"),
        ("preset = 'slow'", "invalid choice: 'slow'"),
        ("temp = [1, 2]", "takes one value"),
        ("[generate]\njson = 1", "json is true or false, not 1"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(
    file: Path, text: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    assert main(["generate", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert str(file) in told
    assert told.count("\n") == 1


def test_a_file_that_the_variable_names_must_exist(file: Path) -> None:
    file.unlink()
    with pytest.raises(InputError, match="does not exist"):
        generate.build_parser().parse_args([])


def test_with_json_an_error_is_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json", "--model", "9bit", "-p", "a"]) == 2
    told = capsys.readouterr()
    assert told.err == ""
    error = json.loads(told.out)["error"]
    assert error["type"] == "ModelNotFoundError"
    assert "4bit" in error["message"]
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--json", "--max-tokens", "many"])
    assert ended.value.code == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "UsageError"
