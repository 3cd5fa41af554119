"""Counted work against figures computed by hand, and the graph's launches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_dgemma.benchmark import graph
from mlx_dgemma.benchmark.chips import CHIPS, known
from mlx_dgemma.benchmark.costs import floor_seconds, prefill_costs, step_costs, total
from mlx_dgemma.benchmark.graph import count_step
from mlx_dgemma.benchmark.synthetic import synthetic_config
from mlx_dgemma.cli.benchmark import main
from mlx_dgemma.errors import InputError
from mlx_dgemma.kernels import dispatch, verdicts
from mlx_dgemma.kernels.table import operations
from mlx_dgemma.kernels.verdicts import Verdict
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.kernel_shapes import kernel_shapes


@pytest.fixture(scope="module")
def published() -> ModelConfig:
    return ModelConfig.from_dict(synthetic_config("26b-4bit"))


def test_a_step_of_the_published_shapes(published: ModelConfig) -> None:
    """TFLOP by hand: 2 x 256 rows x parameters; attention 4 x rows x keys x heads x width."""
    costs = step_costs(published, 1024)
    sliding = 2816 * (16 + 8 + 8 + 16) * 256
    full = 2816 * (16 + 2 + 16) * 512
    projections = 2 * 256 * (25 * sliding + 5 * full)
    mixing = 4 * 256 * 16 * (25 * (1023 + 256) * 256 + 5 * (1024 + 256) * 512)
    assert costs["attention"].flops == projections + mixing
    assert costs["dense"].flops == 2 * 256 * 30 * 3 * 2816 * 2112
    assert costs["experts"].flops == 2 * 256 * 30 * 8 * 3 * 2816 * 704
    assert costs["head"].flops == 2 * 256 * 262_144 * 2816
    assert total(costs).flops == pytest.approx(2.53e12, rel=0.01)
    # 4.5 bits per expert weight, every expert touched
    assert costs["experts"].nbytes == pytest.approx(30 * 128 * 3 * 2816 * 704 * 4.5 / 8, rel=1e-3)


def test_sparse_and_missing_self_conditioning_cost_less(published: ModelConfig) -> None:
    kinds = ("none", "sparse", "dense")
    costs = [step_costs(published, 1024, conditioning=kind)["self-conditioning"] for kind in kinds]  # type: ignore[arg-type]
    assert costs[0].flops == costs[0].nbytes == 0
    assert costs[1].flops < costs[2].flops / 10


def test_few_rows_touch_few_experts(published: ModelConfig) -> None:
    one = prefill_costs(published, 1)["experts"].nbytes
    many = prefill_costs(published, 256)["experts"].nbytes
    assert one == pytest.approx(many * 8 / 128, rel=0.01)


def test_floors_follow_the_chip(published: ModelConfig) -> None:
    costs = step_costs(published, 1024)
    floors = {name: floor_seconds(costs, chip) for name, chip in CHIPS.items()}
    assert floors["Apple M1"] > floors["Apple M4 Max"] > floors["Apple M5 Max"]
    # arithmetic alone, the slowest part of everything before M5
    assert floors["Apple M4 Max"] >= total(costs).flops / CHIPS["Apple M4 Max"].flops
    assert known("Apple M4 Max") is CHIPS["Apple M4 Max"]
    assert known("AMD EPYC") is None


def test_bfloat16_costs_what_m1_and_m2_emulate(published: ModelConfig) -> None:
    costs = step_costs(published, 1024)
    gains = {
        name: floor_seconds(costs, chip.in_bfloat16()) / floor_seconds(costs, chip)
        for name, chip in CHIPS.items()
    }
    assert 1.6 < gains["Apple M1 Max"] < 30.6 / 17.2  # bytes take as long in both
    assert 1.1 < gains["Apple M2 Ultra"] < 1.2
    assert gains["Apple M3 Max"] == gains["Apple M5 Max"] == 1


def test_fused_operations_need_fewer_launches() -> None:
    counted = count_step(ModelConfig.from_dict(synthetic_config("26b-4bit", 2)))
    written, fused = counted["written out"], counted["kernels"]
    assert fused["launches"] < written["launches"]
    assert fused["by_primitive"]["Metal: row_statistics"] == 1
    assert fused["by_primitive"]["Metal: experts"] == 2 * 2
    # nothing as long as the vocabulary but the raw logits: no softmax over it, no random numbers
    assert "logsumexp" in written["by_primitive"]
    assert "logsumexp" not in fused["by_primitive"]
    assert counted["here"]["launches"] == counted["twins"]["launches"]  # no Metal device
    json.dumps(counted)


def test_a_step_of_the_published_shapes_has_under_800_launches() -> None:
    assert (
        count_step(ModelConfig.from_dict(synthetic_config("26b-4bit")))["kernels"]["launches"] < 800
    )


def test_what_runs_here_follows_the_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_dict(synthetic_config("26b-4bit"))
    assert graph.enabled_here(config) == set()  # no Metal device
    monkeypatch.setattr(dispatch, "available", lambda: True)
    assert graph.enabled_here(config) == set(), "nothing is checked yet"
    every = {
        verdicts.verdict_key(one.operation, dispatch.shape_class(one.shape)): Verdict(True, "wins")
        for one in kernel_shapes(config)
    }
    monkeypatch.setattr(verdicts, "remembered", lambda: every)
    everything = {name for name, one in operations().items() if one.kernels}
    assert graph.enabled_here(config) == everything
    lost = {
        key: Verdict(False, "no gain") if "| moe " in key and "tokens=256" in key else verdict
        for key, verdict in every.items()
    }
    monkeypatch.setattr(verdicts, "remembered", lambda: lost)
    assert graph.enabled_here(config) == everything - {"moe"}
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "off")
    assert graph.enabled_here(config) == set()


def test_the_notes_say_what_the_command_counts(capsys: pytest.CaptureFixture[str]) -> None:
    notes = (Path(__file__).parents[2] / "studies" / "README.md").read_text()
    section = notes.split("## A step, counted\n")[1].split("\n## ")[0]
    command = re.search(r"^    mlx_dgemma\.benchmark (.*)$", section, re.MULTILINE)
    assert command is not None
    assert main([*command[1].split(), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["count"]
    rows = {
        cells[0]: cells[1:]
        for line in section.splitlines()
        if line.startswith("| ") and (cells := [cell.strip() for cell in line[1:-1].split("|")])
    }
    for way, beginning in (
        ("written out", "the contract"),
        ("kernels", "joined matrices"),
        ("twins", "the same operations"),
    ):
        (written,) = (cells for row, cells in rows.items() if row.startswith(beginning))
        assert written == [f"{counted['launches'][way]['launches']:,}"]
    dense = counted["step_with_dense_self_conditioning"]
    for name, costs in counted["components"].items():
        (written,) = (cells for row, cells in rows.items() if row.startswith(name))
        tflop, gigabytes = (float(cell.split()[0]) for cell in written)
        assert tflop == pytest.approx(costs["flops"] / 1e12, abs=0.0006)
        assert gigabytes == pytest.approx(costs["bytes"] / 1e9, abs=0.006)
    step = [f"{counted['step'][key] / scale:{form}} ({dense[key] / scale:{form}})"
            for key, scale, form in (("flops", 1e12, ".2f"), ("bytes", 1e9, ".1f"))]  # fmt: skip
    assert rows["step"] == step


def test_a_synthetic_name_that_is_none() -> None:
    with pytest.raises(InputError, match="26b-4bit"):
        synthetic_config("27b")
    for layers in (0, 999_999):
        with pytest.raises(InputError, match=f"{layers} is not possible: use 1 to 6"):
            synthetic_config("medium", layers)
