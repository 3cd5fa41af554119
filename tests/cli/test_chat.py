"""`mlx_dgemma.chat` by script: what it answers, keeps, saves and refuses."""

from __future__ import annotations

import io
import json
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from mlx_dgemma.cli.chat import HELP, main
from mlx_dgemma.context.prompt_cache import PromptCache

SHORT = ["--max-tokens", "5", "--max-denoising-steps", "2", "--seed", "1"]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(*lines: str, arguments: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        code = main([*SHORT, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The messages of every request, in order."""
    api = import_module("mlx_dgemma.generate")

    seen: list[list[dict[str, str]]] = []
    real = api.stream_generate

    def spy(model, tokenizer, messages, **options):  # type: ignore[no-untyped-def]
        seen.append([dict(message) for message in messages])
        return real(model, tokenizer, messages, **options)

    monkeypatch.setattr(api, "stream_generate", spy)
    return seen


def test_every_turn_sees_the_ones_before(talk, asked) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = talk("first", "second")
    assert code == 0
    assert [message["role"] for message in asked[1]] == ["user", "assistant", "user"]
    assert asked[1][1]["content"] in out
    assert asked[1][2]["content"] == "second"


def test_every_reply_warns_when_it_did_not_converge(talk) -> None:  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # Python's own: equal warnings once
        _, _, err = talk(
            "first", "second", arguments=("--on-unconverged", "warn", "--max-denoising-steps", "1")
        )
    assert err.count("warning: Block 0 used all its 1 denoising steps") >= 2


def test_reset_and_system(talk, asked) -> None:  # type: ignore[no-untyped-def]
    talk("first", "/system Be brief.", "second", "/reset", "third", "/system", "fourth")
    assert [[m["role"] for m in messages] for messages in asked] == [
        ["user"],
        ["system", "user"],
        ["system", "user"],
        ["user"],
    ]


def test_a_line_continues_behind_a_backslash(talk, asked) -> None:  # type: ignore[no-untyped-def]
    talk("one \\", "two")
    assert asked[0][0]["content"] == "one \ntwo"


def test_only_the_new_turn_is_read(talk, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    read: list[tuple[int, int]] = []
    align = PromptCache.align

    def spy(self: PromptCache, prompt: list[int]) -> list[int]:
        rest = align(self, prompt)
        read.append((len(prompt), len(rest)))
        return rest

    monkeypatch.setattr(PromptCache, "align", spy)
    talk("first", "second")
    assert read[0][0] == read[0][1]
    assert read[1][1] < read[1][0]
    assert read[1][0] - read[1][1] == read[0][0]


def test_a_conversation_is_saved_and_continued(talk, asked, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "talk.safetensors"
    _, _, err = talk("first", f"/save {file}", "second", "/reset", f"/load {file}", "second")
    assert "Saved 1 turn" in err
    assert "1 turn." in err
    assert asked[1] == asked[2]


def test_the_prompt_cache_file_holds_it_from_run_to_run(talk, asked, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = ("--prompt-cache-file", str(tmp_path / "talk.safetensors"))
    talk("first", arguments=file)
    _, _, err = talk("second", arguments=file)
    assert "Continuing" in err
    assert asked[1][:1] == asked[0]
    assert asked[1][-1]["content"] == "second"


def test_seed_think_and_help(talk) -> None:  # type: ignore[no-untyped-def]
    _, _, err = talk("/seed 4", "/seed", "/think", "/think off", "/think on", "/help")
    assert "Every reply uses seed 4." in err
    assert "A fresh seed" in err
    assert err.count("The model thinks first.") == 2
    assert HELP.splitlines()[0] in err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/nope", "There is no command /nope"),
        ("/seed x", "/seed takes a whole number"),
        ("/seed ²", "/seed takes a whole number"),
        ("/think maybe", "/think takes on, off or nothing"),
        ("/save", "/save takes a file name"),
        ("/save /no/such/folder/x", "There is nothing to save yet"),
        ("/load", "/load takes a file name"),
        ("/load /no/such/file", "/no/such/file"),
    ],
)
def test_a_mistake_is_said_and_the_chat_goes_on(line: str, sentence: str, talk) -> None:  # type: ignore[no-untyped-def]
    code, _, err = talk(line, "/seed 5")
    assert code == 0
    assert sentence in err
    assert "Every reply uses seed 5." in err


def test_a_context_without_its_conversation_is_refused(talk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from mlx_dgemma.checkpoint.loading import load

    model, _ = load()
    cache = PromptCache(model)
    cache.align([5, 6])
    cache.save(tmp_path / "bare.safetensors")
    _, _, err = talk(f"/load {tmp_path / 'bare.safetensors'}")
    assert "error: " in err
    assert json.dumps("Continuing") not in err


@pytest.mark.parametrize("messages", ["x", [1], [{"role": "pope"}], [{"content": [{}]}]])
def test_a_damaged_conversation_is_refused(messages, talk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from mlx_dgemma.checkpoint.loading import load

    cache = PromptCache(load()[0])
    cache.mark([])
    cache.cache.metadata["messages"] = messages if messages == "x" else json.dumps(messages)
    cache.save(tmp_path / "talk")
    code, _, err = talk(f"/load {tmp_path / 'talk'}")
    assert code == 0
    assert f"error: The conversation in {tmp_path / 'talk'} is damaged: delete the file." in err


def test_what_cannot_be_saved_says_why(talk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, _, err = talk("hello", "/save /no/such/folder/x", f"/save {tmp_path}", "/load /no/such/file")
    assert "error: The context cannot be saved to /no/such/folder/x: No such file or d" in err
    assert f"error: {tmp_path} is no regular file and must not be replaced" in err
    assert "error: /no/such/file cannot be read as a saved context: No such file or d" in err


def test_quit_ends_at_once(talk, asked) -> None:  # type: ignore[no-untyped-def]
    assert talk("/quit", "never asked")[0] == 0
    assert asked == []
