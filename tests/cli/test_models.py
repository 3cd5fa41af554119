"""`mlx_dgemma.models` against a Hub of our own: listed, fetched, removed. And completion."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_dgemma.__main__ import main
from mlx_dgemma.checkpoint.hub import demo_path, repository_id
from mlx_dgemma.checkpoint.known_repositories import COMMUNITY, KNOWN_REPOSITORIES
from mlx_dgemma.cli.verbs import VERBS
from mlx_dgemma.errors import ModelNotFoundError
from tests.checkpoint.conftest import hub
from tests.checkpoint.stub import HubStub

__all__ = ["hub"]
FOUR = f"{COMMUNITY}-4bit"
FILES = {
    "config.json": b'{"model_type": "diffusion_gemma"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
}


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, int]]:
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    return {model["name"]: (model["state"], model["disk_bytes"]) for model in found}


def test_a_model_is_listed_fetched_and_removed(
    hub: HubStub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(FOUR, FILES)
    hub.add("someone/tuned", FILES)
    hub.add("someone/other", {**FILES, "config.json": b'{"model_type": "llama"}'})
    assert listed(capsys)["4bit"] == ("not here", 0)
    for name in ("4bit", "someone/tuned", "someone/other"):
        assert main(["models", "download", name]) == 0
    capsys.readouterr()
    found = listed(capsys)
    size = sum(map(len, FILES.values()))
    assert found["4bit"] == found["someone/tuned"] == ("ready", size)
    assert "someone/other" not in found

    assert main(["models", "remove", "4bit"]) == 2  # nobody can be asked
    assert "--yes" in capsys.readouterr().err
    assert main(["models", "remove", "4bit", "--yes"]) == 0
    assert "freed" in capsys.readouterr().out
    assert listed(capsys)["4bit"] == ("not here", 0)
    assert main(["models", "--json", "remove", "4bit", "--yes"]) == 2
    assert FOUR in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_download_that_was_cut_is_partial(
    hub: HubStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(FOUR, FILES)
    assert main(["models", "download", "4bit"]) == 0
    (weights,) = (tmp_path / "hub").rglob("model.safetensors")
    weights.unlink()
    capsys.readouterr()
    assert listed(capsys)["4bit"][0] == "partial"


def test_a_folder_is_not_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(demo_path(), folder)
    assert main(["models", "remove", str(folder), "--yes"]) == 2
    assert "delete it yourself" in capsys.readouterr().err
    assert (folder / "config.json").is_file()


def test_short_names_are_the_ends_of_the_known() -> None:
    assert repository_id("4bit") == FOUR
    assert repository_id(FOUR) == FOUR
    assert len({known.short for known in KNOWN_REPOSITORIES}) == len(KNOWN_REPOSITORIES)
    with pytest.raises(ModelNotFoundError, match=r"8bit, bf16, google and demo\."):
        repository_id("7bit")


def test_completion_knows_every_verb_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab, the completion extra, is not installed")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    typed = """
COMP_WORDS=(mlx_dgemma {words}); COMP_CWORD={last}; COMPREPLY=()
_shtab_mlx_dgemma mlx_dgemma "${{COMP_WORDS[$COMP_CWORD]}}"; printf '%s\\n' "${{COMPREPLY[@]}}"
"""

    def completed(*words: str) -> set[str]:
        ask = typed.format(words=" ".join(f"'{word}'" for word in words), last=len(words))
        done = subprocess.run(
            ["bash", "-c", script + ask], capture_output=True, text=True, check=True
        )
        return set(done.stdout.split())

    assert set(VERBS) <= completed("")
    assert completed("gen") == {"generate"}
    assert "--max-denoising-steps" in completed("generate", "--max")
    assert completed("generate", "--preset", "ba") == {"balanced"}
    assert "--hf-path" in completed("convert", "--hf")
    assert main(["completion", "zsh"]) == 0
    assert "#compdef mlx_dgemma" in capsys.readouterr().out
