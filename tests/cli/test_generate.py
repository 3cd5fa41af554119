"""`mlx_dgemma.generate` on the demo checkpoint: what is printed where, and what is refused."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from mlx_dgemma.cli.generate import main

# Few steps: these tests are about the command, not about the answer.
SHORT = ["--max-tokens", "6", "--max-denoising-steps", "3", "--seed", "1"]
PROMPT = ["--prompt", "Reverse: abc"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_piped_output_is_the_text_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *PROMPT, *SHORT)
    assert code == 0
    record = json.loads(run(capsys, *PROMPT, *SHORT, "--json")[1])
    assert out == record["text"].rstrip("\n") + "\n"
    assert err.count("bundled demo checkpoint") == 1


def test_json_can_tell_how_sure_each_token_is(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(run(capsys, *PROMPT, *SHORT, "--json", "--logprobs")[1])
    assert len(record["tokens"]) == record["generated_tokens"]
    for token in record["tokens"]:
        assert set(token) == {"text", "id", "logprob", "entropy", "settled"}
        assert token["logprob"] <= 0 <= token["entropy"]
        assert token["settled"] >= 1


def test_json_is_one_object_with_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *PROMPT, *SHORT, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["model"] == "demo"
    assert record["seed"] == 1
    assert record["generated_tokens"] <= 6
    assert sum(record["steps_per_block"]) <= 3 * record["blocks"] * 3
    assert record["tokens_per_forward"] > 0
    assert {"finish_reason", "converged", "prompt_tokens", "peak_memory_bytes"} <= set(record)


def test_verbose_adds_the_figures_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, *PROMPT, *SHORT, "--verbose")
    assert "tokens per forward" in err
    assert "steps per block" in err
    assert "tokens per forward" not in out
    assert "seed 1" not in run(capsys, *PROMPT, *SHORT, "--verbose", "False")[2]


def test_a_prompt_from_standard_input_or_a_file_is_the_same_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = run(capsys, *PROMPT, *SHORT)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Reverse: abc")))
    assert run(capsys, "--prompt", "-", *SHORT)[1] == expected
    file = tmp_path / "prompt.txt"
    file.write_text("Reverse: abc")
    assert run(capsys, "--prompt-file", str(file), *SHORT)[1] == expected


def test_the_raw_prompt_leaves_the_template_out(capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(run(capsys, *PROMPT, *SHORT, "--json")[1])
    raw = json.loads(run(capsys, *PROMPT, *SHORT, "--json", "--ignore-chat-template")[1])
    assert raw["prompt_tokens"] < whole["prompt_tokens"]


def test_without_a_prompt_the_demo_answers_a_held_out_question(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run(capsys, *SHORT)
    assert code == 0
    assert "sudoku" in err
    assert "checked: " in err
    record = json.loads(run(capsys, "--demo", "tool", "--json", *SHORT)[1])
    assert record["right"] in (True, False)


def test_a_dry_run_prints_the_plan_and_loads_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mlx_dgemma.checkpoint.loading.load", lambda *_, **__: pytest.fail("loaded")
    )
    code, out, _ = run(capsys, "--dry-run")
    assert code == 0
    assert "demo needs" in out
    assert "context of 8,192 tokens" in out
    record = json.loads(run(capsys, "--dry-run", "--json", "--max-tokens", "16000")[1])
    assert record["context_tokens"] == 8192  # the demo has no room for more
    assert record["total_bytes"] == sum(
        record[f"{part}_bytes"] for part in ("weights", "context", "working")
    )


def test_a_trace_replays_to_the_same_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    text = run(capsys, *PROMPT, *SHORT, "--trace", str(trace))[1]
    code, again, _ = run(capsys, "--replay", str(trace))
    assert (code, again.strip()) == (0, text.strip())
    record = json.loads(run(capsys, "--replay", str(trace), "--json")[1])
    assert record["divergence"] is None


def test_a_block_that_does_not_converge(capsys: pytest.CaptureFixture[str]) -> None:
    short = [*PROMPT, "--seed", "1", "--max-denoising-steps", "1", "--on-unconverged"]
    code, out, err = run(capsys, *short, "refuse")
    assert (code, out) == (2, "")
    assert "error: Block 0 did not converge" in err
    record = json.loads(run(capsys, *short, "refuse", "--json")[1])
    assert record["finish_reason"] == "unconverged"
    code, out, err = run(capsys, *short, "warn")
    assert code == 0
    warnings = [line for line in err.splitlines() if "bundled demo" not in line]
    assert all(line.startswith("warning: Block ") for line in warnings)
    assert warnings


def test_a_prompt_cache_spares_the_prefill(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "context.safetensors"
    cached = [*PROMPT, *SHORT, "--prompt-cache-file", str(file), "--json"]
    first = json.loads(run(capsys, *cached)[1])
    assert file.is_file()
    again = json.loads(run(capsys, *cached)[1])
    assert again["text"] == first["text"]
    assert again["prompt_tokens"] == first["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "  "], "The prompt is empty"),
        ([*PROMPT, "--max-tokens", "0"], "max_tokens=0 is not possible"),
        ([*PROMPT, "--max-tokens", "-3"], "max_tokens=-3 is not possible"),
        ([*PROMPT, "--temp", "-1"], "temp=-1.0 is not possible"),
        ([*PROMPT, "--temp", "nan"], "temp=nan is not possible"),
        ([*PROMPT, "--seed", "-1"], "seed=-1 is not possible"),
        ([*PROMPT, "--entropy-bound", "-0.1"], "entropy_bound=-0.1 is not possible"),
        ([*PROMPT, "--t-min", "2"], "t_min=2.0 is not possible"),
        ([*PROMPT, "--canvas-length", "0"], "canvas_length=0 is not possible"),
        ([*PROMPT, "--model", "/no/such/folder"], "There is no folder /no/such/folder"),
        (["--model", "/no/such/folder"], "There is no prompt"),
        (["--prompt-file", "/no/such/file"], "Cannot read the prompt file /no/such/file"),
        (["--demo", "nope"], "--demo knows no task 'nope'"),
        (["--demo", ""], "--demo knows no task ''"),
        ([*PROMPT, "--t-max", "0"], "t_max=0.0 is not possible"),
        ([*PROMPT, "--model", "x" * 5000], "cannot be opened: File name too long"),
        ([*PROMPT, "--model", "~no.such.user/x"], "cannot be opened: Could not determine home"),
        ([*PROMPT, "--trace", "x" * 300], "cannot be written: File name too long"),
        ([*PROMPT, "--trace", "/"], "cannot be written: it is a folder"),
        ([*PROMPT, "--revision", "v2"], "has no revision v2: name the repository as well"),
        (["--dry-run", "--revision", "v2"], "has no revision v2: name the repository as well"),
        ([*PROMPT, "--logprobs"], "--logprobs are part of the JSON: add --json"),
        (["--replay", "/no/such/trace"], "Cannot read the trace /no/such/trace"),
        (["--replay", "t", "--trace", "u", "--seed", "3"], "leave out --seed, --trace."),
        (
            [*PROMPT, "--prompt-cache-file", "/no/such/folder/c"],
            "there is no folder /no/such/folder",
        ),
        ([*PROMPT, "--trace", "/no/such/folder/t"], "--trace /no/such/folder/t cannot be written"),
        (["--prompt", "word " * 9000, *SHORT], "shorten it"),
        ([*PROMPT, *SHORT, "--canvas-length", "100000"], "use at most that, or leave it out for"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("flag", ["--trace", "--prompt-cache-file"])
def test_what_is_no_regular_file_is_never_replaced(
    flag: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code, out, err = run(capsys, *PROMPT, *SHORT, flag, str(pipe))
    assert (code, out) == (2, "")
    assert err == f"error: {pipe} is no regular file and must not be replaced: name another.\n"
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-flag"],
        ["--temp", "warm"],
        ["--max-tokens", "1.5"],
        ["--sampler", "ddim"],
        ["--pace", "-1"],
        ["--verbose", "perhaps"],
        ["--prompt", "a", "--prompt-file", "b"],
    ],
)
def test_an_unknown_flag_or_value_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("mlx_dgemma.generate: ")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "config.json"),
        ({"config.json": "{"}, "config.json"),
        ({"config.json": '{"model_type": "llama"}'}, "llama"),
    ],
)
def test_a_folder_that_is_no_checkpoint(
    files: dict[str, str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, _, err = run(capsys, *PROMPT, "--model", str(tmp_path))
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


def test_input_that_is_not_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"\x89PNG\xff\xfe")
    assert "is not UTF-8 text" in run(capsys, "--prompt-file", str(file))[2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert "Standard input is not UTF-8" in run(capsys, "--prompt", "-")[2]


def test_a_context_in_8_bits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = str(tmp_path / "context")
    asked = (*PROMPT, *SHORT, "--prompt-cache-file", saved)
    assert run(capsys, *asked, "--kv-bits", "8")[0] == 0
    assert run(capsys, *asked, "--kv-bits", "8")[0] == 0
    code, _, err = run(capsys, *asked)
    assert code == 2
    assert "holds an 8-bit context" in err
    plans = [
        json.loads(run(capsys, "--dry-run", "--json", *flag)[1])
        for flag in ((), ("--kv-bits", "8"))
    ]
    assert [plan["kv_bits"] for plan in plans] == [None, 8]
    assert plans[1]["context_bytes"] < plans[0]["context_bytes"]
    with pytest.raises(SystemExit) as refused:
        main([*PROMPT, "--kv-bits", "4"])
    assert refused.value.code == 2
    assert "--kv-bits: invalid choice: 4" in capsys.readouterr().err
