"""The audit of magnitudes sees what passes float16's range, and decides what is computed in."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.benchmark import overflow
from mlx_dgemma.checkpoint import audits, loading
from mlx_dgemma.checkpoint.audits import LIMIT, Audit
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.cli import doctor
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.kernels import dispatch, verdicts
from mlx_dgemma.model import attention

if (folder := str(Path(__file__).parents[1] / "oracles")) not in sys.path:
    sys.path.insert(0, folder)

from plain_checkpoint import write_plain

HARMLESS = Audit(79.0, "attention scores", 14_910.0, 1e-4, True, 8, 0.0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_residual_beyond_the_limit_is_seen(tmp_path: Path) -> None:
    def enlarge(tensors: dict) -> None:
        for name in tensors:
            if name.endswith(".post_feedforward_layernorm.weight"):
                tensors[name] = tensors[name] * 1e5

    model = load_model(write_plain(tmp_path / "checkpoint", change=enlarge), lazy=True)
    real = attention.attend
    with overflow.watched(model) as watch:
        cache = model.make_cache()
        model.prefill(np.arange(20)[None], cache)
        model.denoise(mx.zeros((1, 12), mx.int32), cache)
    watch.evaluate()
    largest = {kind: float(value.item()) for kind, value in watch.largest.items()}
    assert largest["residual"] > LIMIT
    assert largest["layers.self_attn.q_proj input"] < 100  # a norm stands before it
    assert {"layers.experts.down_proj input", "attention scores"} < set(largest)
    assert attention.attend is real


def test_the_demo_passes_and_is_remembered(capsys, monkeypatch) -> None:
    monkeypatch.setattr(overflow.audit, "__defaults__", (overflow.PROMPTS[:1], 16))
    assert doctor.main(["--audit", str(CHECKPOINT), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["float16"]
    known = audits.recall(CHECKPOINT)
    assert known is not None
    assert told["passed"]
    assert told["checkpoint"] == audits.identity(CHECKPOINT)[:12]
    assert 79 < known.largest < LIMIT / audits.HEADROOM
    assert known.replies == 1
    assert known.where.startswith("vision")  # of the text model's 79
    assert known.branches > 1000
    assert known.branches / known.unit <= LIMIT / audits.UNIT_HEADROOM
    assert known.loss < 1e-3
    assert doctor.main([]) == 0
    assert "float16 would hold checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "unit", "failure"),
    [
        ({}, 8, None),
        ({"branches": 100.0}, 1, None),
        ({"largest": 9e3}, 8, "attention scores reaches 9,000"),
        ({"branches": 2e5}, 128, "down_proj reaches 200,000"),
        ({"units": False}, 8, "down_proj reaches 14,910, in a packing without units"),
        ({"units": False, "branches": 100.0}, 1, None),
        ({"loss": 0.1}, 8, "a stored tensor loses 1.0e-01 of its norm"),
        ({"largest": float("nan")}, 8, "attention scores reaches nan"),
        ({"branches": float("inf")}, 128, "down_proj reaches inf"),
    ],
)
def test_what_passes(change, unit, failure) -> None:
    audit = replace(HARMLESS, **change)
    assert (audit.unit, audit.failure) == (unit, failure)


M1, M3 = "applegpu_g13s", "applegpu_g15s"


@pytest.mark.parametrize(
    ("chip", "dtype", "adapted", "audit", "chosen"),
    [
        (M1, None, False, HARMLESS, ("float16", 8)),
        ("applegpu_g14g", None, False, HARMLESS, ("float16", 8)),
        (M3, None, False, HARMLESS, (None, 1)),
        (M1, None, False, None, (None, 1)),
        (M1, None, False, replace(HARMLESS, largest=1e6), (None, 1)),
        (M1, None, True, HARMLESS, (None, 1)),
        (M1, "bfloat16", False, HARMLESS, ("bfloat16", 1)),
        (M1, "float32", False, HARMLESS, ("float32", 1)),
        (M3, "float16", False, HARMLESS, ("float16", 8)),
        (M3, "float16", False, None, ("float16", 1)),
    ],
)
def test_float16_is_chosen(monkeypatch, chip, dtype, adapted, audit, chosen) -> None:
    monkeypatch.setattr(verdicts, "chip", lambda: chip)
    monkeypatch.setattr(dispatch, "available", lambda: True)
    if audit is not None:
        audits.remember(CHECKPOINT, audit)
    assert audits.choose(CHECKPOINT, dtype, adapted=adapted) == chosen


def test_load_computes_in_what_was_chosen(monkeypatch) -> None:
    asked: dict = {}
    monkeypatch.setattr(verdicts, "chip", lambda: M1)
    monkeypatch.setattr(audits.dispatch, "available", lambda: True)
    monkeypatch.setattr(dispatch, "prepare", lambda *_: None)
    monkeypatch.setattr(loading, "load_model", lambda folder, **how: asked.update(how))
    audits.remember(CHECKPOINT, HARMLESS)
    loading.load_network()
    assert (asked["dtype"], asked["unit"]) == (mx.float16, 8)


def test_another_training_is_another_checkpoint(tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(CHECKPOINT, folder)
    assert audits.identity(folder) == audits.identity(CHECKPOINT)
    weights = next(folder.glob("*.safetensors"))
    stored = bytearray(weights.read_bytes())
    for place in range(len(stored) // 2, len(stored)):
        stored[place] ^= 1
    weights.write_bytes(stored)
    assert audits.identity(folder) != audits.identity(CHECKPOINT)


def test_a_file_that_is_no_record_counts_as_empty() -> None:
    audits.audit_file().parent.mkdir(parents=True)
    wrong = json.dumps({"a": {**asdict(HARMLESS), "branches": "many"}})
    for text in ("", "[]", '{"a": {"largest": 1}}', '{"a": 3}', wrong):
        audits.audit_file().write_text(text)
        assert audits.everything() == {}


def test_a_damaged_audit_leaves_the_others_in_force() -> None:
    good = asdict(HARMLESS)
    damage: list[dict[str, object]] = [
        {"largest": 10**400}, {"when": float("nan")}, {"branches": float("inf")},
        {"where": ["x"]}, {"units": "no"}, {"loss": True}, {"more": 1},
    ]  # fmt: skip
    stored = {f"bad {n}": {**good, **one} for n, one in enumerate(damage)}
    audits.audit_file().parent.mkdir(parents=True)
    audits.audit_file().write_text(json.dumps({**stored, "good": good}))
    assert audits.everything() == {"good": HARMLESS}
