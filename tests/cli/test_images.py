"""Images on the command line and in the chat: what is listed, kept, and refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_dgemma.cli import chat, generate
from mlx_dgemma.model import Model
from tests.prompt.drawings import animation, photograph, saved

SHORT = ["--max-tokens", "5", "--max-denoising-steps", "2", "--seed", "1"]
ASK = ["--prompt", "What is in the picture?"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photograph(60, 50).save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = generate.main([*SHORT, *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_images_and_videos_are_listed(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path
) -> None:
    film = tmp_path / "film.gif"
    film.write_bytes(animation(3))
    given = ["--image", str(photo), "--video", str(film), "--image-tokens", "70"]
    code, out, _ = run(capsys, *ASK, *given, "--json")
    assert code == 0
    image, video = json.loads(out)["images"]
    assert (image["name"], image["width"], image["height"]) == ("photo.png", 60, 50)
    assert 0 < image["soft_tokens"] <= 70
    assert (video["name"], video["frames"]) == ("film.gif", 3)
    assert json.loads(out)["prompt_tokens"] > image["soft_tokens"] + video["soft_tokens"]

    _, _, err = run(capsys, *ASK, *given, "--verbose")
    assert f"photo.png 60x50, {image['soft_tokens']} soft tokens" in err
    assert f"film.gif 24x16, 3 frames of {video['soft_tokens'] // 3} soft tokens" in err


def test_an_image_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SimpleNamespace(buffer=io.BytesIO(saved(photograph(30, 20))), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", file)
    code, out, _ = run(capsys, *ASK, "--image", "-", "--json")
    assert code == 0
    assert json.loads(out)["images"][0]["name"] == "standard input"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "nothing.png", *ASK], "There is no file nothing.png"),
        (["--video", "nothing.mp4", *ASK], "There is no file nothing.mp4"),
        (["--image", __file__, *ASK], "not an image"),
        (["--image", "ftp://host/a.png", *ASK], "http and https"),
        (["--image", "-", "--prompt", "-"], "read once"),
        (["--image", "PHOTO"], "There is no prompt"),
        (["--image", "PHOTO", "--demo", "sudoku"], "brings its own picture"),
        (["--image", "PHOTO", "--ignore-chat-template", *ASK], "chat template"),
    ],
)
def test_refusals_come_before_the_model(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    photo: Path,
    arguments: list[str],
    words: str,
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded for a request that cannot be served")

    monkeypatch.setattr(generate, "open_session", loaded)
    code, out, err = run(capsys, *[str(photo) if a == "PHOTO" else a for a in arguments])
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_another_budget_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(capsys, *ASK, "--image-tokens", "300")
    assert ended.value.code == 2
    assert "1120" in capsys.readouterr().err


def test_a_conversation_about_a_picture(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    photo: Path,
    tmp_path: Path,
) -> None:
    encoded = []
    encode = Model.image_features

    def watched(self: Model, image: object) -> object:
        encoded.append(image)
        return encode(self, image)

    monkeypatch.setattr(Model, "image_features", watched)

    def talk(*lines: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        assert chat.main(SHORT) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    file = tmp_path / "talk.safetensors"
    _, err = talk(f"/image {photo}", "What is this?", "And its colour?", f"/save {file}")
    assert "With the next message: photo.png 60x50" in err
    assert len(encoded) == 1
    _, err = talk(f"/load {file}", "Where is it?")
    assert "2 turns" in err
    assert len(encoded) == 1  # it came with the context

    _, err = talk("/image", "/image nothing.png")
    assert "/image takes a file name" in err
    assert "There is no file" in err
    assert "nothing.png" in err
    photo.unlink()
    _, err = talk(f"/load {file}")
    assert "There is no file" in err
