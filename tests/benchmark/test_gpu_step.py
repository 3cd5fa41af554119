"""The one script for a lent GPU: every line of it runs here, on a narrow network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

if (folder := str(Path(__file__).parents[2] / "studies")) not in sys.path:
    sys.path.insert(0, folder)

import gpu_step

from mlx_dgemma.benchmark.synthetic import synthetic_config
from mlx_dgemma.benchmark.versus import OURS, SLICED, THEIRS

RUN = {"step_seconds": 0.2, "weights_bytes": 10.0, "bytes_above_weights": 5.0}


@pytest.mark.slow
def test_a_rehearsal_runs_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlx_vlm", reason="mlx-vlm, which it compares with, is not installed")
    gpu_step.main(["--rehearse", "--prompt-tokens", "8", "--steps", "1", "--minutes", "0"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert set(found["runtimes"]) == {OURS, SLICED, THEIRS}
    for one in found["runtimes"].values():
        assert one["ms_per_step"] > 0
        assert one["peak_bytes"] > one["bytes_above_weights"] > 0
    assert found["rounds"] == 1  # what began is finished, though the time was over
    assert "moe" in found["kernels"]
    steps = [line.split("s  ")[1] for line in printed.err.splitlines() if " s  " in line]
    assert steps == ["checking the kernels", "writing the checkpoint", "round 1"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", "0"], ["--steps=-5"], ["--prompt-tokens=-1"], ["--minutes", "nan"],
        ["--minutes=-1"], ["--minutes", "inf"], ["--nope"],
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_before_anything_is_written(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_step.main(["--rehearse", *flags])
    assert ended.value.code == 2
    assert "writing the checkpoint" not in capsys.readouterr().err


def test_a_model_that_there_is_not_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_step.main(["--rehearse", "--synthetic", "nope"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: There is no synthetic model 'nope'")
    assert told.count("\n") == 1


def test_it_rehearses_the_published_packing() -> None:
    raw = synthetic_config("26b-4bit")
    small = gpu_step.rehearsal(raw)
    assert small["quantization"] == raw["quantization"]
    assert small["text_config"]["layer_types"] == ["sliding_attention", "full_attention"]


class Clock:
    """Each look at a round takes `seconds`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_no_round_begins_that_would_not_end_in_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, lengths = Clock(), [100.0, 120.0, 100.0, 100.0, 100.0]

    def compare(*_: object, **__: object) -> dict[str, dict[str, float]]:
        clock.now += lengths.pop(0)
        return {OURS: {**RUN, "step_seconds": clock.now}}

    monkeypatch.setattr(gpu_step, "time", clock)
    monkeypatch.setattr(gpu_step, "compare", compare)
    monkeypatch.setattr(gpu_step, "write_checkpoint", lambda *_: None)
    gpu_step.main(["--rehearse", "--minutes", "7.5"])
    found = json.loads(capsys.readouterr().out)
    assert clock.now == 320  # a fourth could have ended at 320 + 1.3 * 120 > 450
    assert found["rounds"] == 3
    assert found["runtimes"][OURS]["ms_per_step"] == 220_000
