"""`mlx_dgemma.benchmark` on the demo checkpoint: every mode's record, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from mlx_dgemma.benchmark import quality
from mlx_dgemma.benchmark.quality import Answer
from mlx_dgemma.cli.benchmark import main
from mlx_dgemma.cli.benchmark.quality import show

QUICK = ["--prompt-tokens", "8", "--steps", "1", "--runs", "1"]


def record(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, report = tmp_path / "step.svg", tmp_path / "report.json"
    found = record(capsys, *QUICK, "--ceilings", "--plot", str(picture), "--report", str(report))
    assert json.loads(report.read_text()) == found
    assert set(found["passes"]) == {"prefill", "first step", "step", "commit"}
    assert {"attention", "dense", "experts", "head", "sampler"} < set(found["components"])
    for values in (*found["passes"].values(), *found["components"].values()):
        assert values["ms"] > 0
        assert values["roofline_fraction"] == pytest.approx(values["floor_ms"] / values["ms"])
    assert found["ceiling"]["source"] == "measured here"
    drawn = ElementTree.parse(picture).getroot()
    bars = [node for node in drawn.iter() if node.tag.endswith("rect")][1:]
    assert len(bars) == 1 + len(found["components"])


def test_quality(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--quality", "--prompts", "2", "--task", "sort")
    found = record(capsys, *quick, "--preset", "turbo")
    assert found["preset"] == "turbo"
    (task,) = found["quality"]["tasks"].items()
    assert task[0] == "sort"
    assert 0 <= task[1]["right"] <= 1
    assert task[1]["n"] == found["quality"]["overall"]["n"] == 2
    assert 1 <= task[1]["steps"] <= 16


@pytest.mark.parametrize(("prompts", "shown"), [(1, 0), (2, 2)])
def test_one_answer_has_no_error(
    prompts: int, shown: int, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [Answer(True, (3,), 8, 0.1)] * prompts
    tasks = {"sort": quality.figures(answers)}
    show({"tasks": tasks, "overall": quality.overall(tasks)}, Console(width=100))
    printed = capsys.readouterr().out
    assert "1.00" in printed
    assert printed.count("±") == shown


def test_timing_needs_no_tokenizer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mlx_dgemma.checkpoint.loading.load_tokenizer", lambda *_: pytest.fail("loaded")
    )
    assert main([*QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_counts_are_called_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count"]) == 0
    shown = capsys.readouterr().out
    assert "predicted by the roofline model, not measured" in shown
    assert "Apple M4 Max" in shown


def test_a_context_in_8_bits_moves_fewer_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    long = ("--count", "--synthetic", "26b-4bit", "--prompt-tokens", "262144")
    exact, packed = (
        record(capsys, *long, *flag)["count"]["components"]["attention"]["bytes"]
        for flag in ((), ("--kv-bits", "8"))
    )
    # 5 layers x keys and values x 2 heads of 512: 2 bytes against 1 and its share of the scales
    assert exact - packed == 262_144 * 5 * 2 * 2 * 512 * (2 - 1.0625)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--count", "--quality"], "choose one"),
        (["--synthetic", "26b-4bit", "--model", "here"], "choose one"),
        (["--layers", "2"], "name one with --synthetic"),
        (["--quality", "--synthetic", "medium"], "Random weights answer nothing"),
        (["--quality", "--task", "chess"], "no task 'chess'"),
        (["--synthetic", "27b"], "no synthetic model '27b'"),
        (["--plot", "/no/folder/here.svg"], "no folder"),
        (["--count", "--plot", "here.svg"], "times none"),
        (["--prompt-tokens", "8161"], "8160 fit into the context beside a canvas of 32"),
        (["--compare", "mlx-vlm", "--prompt-tokens", "9000"], "is too long"),
        (["--compare", "mlx-vlm", "--kv-bits", "8"], "leave --kv-bits out"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_mlx_vlm_beside(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlx_vlm")
    quick = ("--compare", "mlx-vlm", "--prompt-tokens", "8", "--steps", "1", "--runs", "1")
    found = record(capsys, *quick)["compare"]
    assert found["mlx_dgemma"]["step_seconds"] > 0
    assert found["mlx-vlm"]["bytes_above_weights"] > 0
    assert found["mlx-vlm"]["step_seconds_ratio"] == 1
    ours, sliced = found["mlx_dgemma"], found["mlx_dgemma, head in slices"]
    assert ours["weights_bytes"] == sliced["weights_bytes"] > 0
