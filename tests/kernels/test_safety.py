"""A kernel that fails in any way leaves its twin in place: verdicts, their memory, modes, the
report.
"""

import inspect
import json
import logging
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dgemma.errors import InputError
from mlx_dgemma.kernels import registry, verdicts
from mlx_dgemma.kernels.report import EVIDENCE, published_shapes, report

FAKE = Path(__file__).parent / "fake_self_check.py"
OPERATION = registry.Operation("fake", (), lambda shape: iter(()))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "cache_file", lambda: tmp_path / "cache" / "kernels.json")
    monkeypatch.setattr(verdicts, "TIMEOUT", 30.0)
    monkeypatch.delenv("MLX_DGEMMA_KERNELS", raising=False)


def broken(monkeypatch, kind):
    monkeypatch.setattr(verdicts, "command", lambda *_: [sys.executable, str(FAKE), kind])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("does not compile", "Unable to build metal library"),
        ("wrong", "probe 0: error 0.5 above 0.001"),
        ("wrong integer", "error inf"),
        ("NaN", "error inf"),
        ("racy", "two launches gave different values"),
        ("crashes", "died of signal 11"),
        ("slow", "no gain above 5 %"),
        ("garbage", "printed no findings"),
        ("silent", "printed no findings"),
    ],
)
def test_a_broken_kernel_stays_off_and_is_logged_once(kind, reason, monkeypatch, caplog):
    broken(monkeypatch, kind)
    with caplog.at_level(logging.WARNING, logger="mlx_dgemma.kernels"):
        found = verdicts.verdict(OPERATION, {"size": 4})
        again = verdicts.verdict(OPERATION, {"size": 4})
    assert not found.enabled
    assert reason in found.reason
    assert again == found
    assert sum("kernel is off" in record.message for record in caplog.records) == 1


def test_who_waits_for_checks_is_told_once(monkeypatch, caplog):
    broken(monkeypatch, "good")
    verdicts._announce.cache_clear()
    for size in (4, 5):
        verdicts.verdict(OPERATION, {"size": size})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "MLX_DGEMMA_KERNELS=off" in caplog.text


@pytest.mark.parametrize(("kernel_ms", "enabled"), [(0.94, True), (0.96, False), (1.0, False)])
def test_a_kernel_must_win_by_more_than_five_percent(kernel_ms, enabled):
    assert verdicts._judge(None, 0.0, kernel_ms, 1.0).enabled is enabled


def test_a_kernel_that_hangs_is_given_up(monkeypatch):
    broken(monkeypatch, "hangs")
    monkeypatch.setattr(verdicts, "TIMEOUT", 0.5)
    assert "did not finish within 0.5 s" in verdicts.verdict(OPERATION, {}).reason


def test_a_process_that_cannot_start(monkeypatch):
    monkeypatch.setattr(verdicts, "command", lambda *_: ["/no/such/python"])
    assert "could not start" in verdicts.verdict(OPERATION, {}).reason


def test_a_good_kernel_is_enabled_and_remembered(monkeypatch):
    broken(monkeypatch, "good")
    found = verdicts.verdict(OPERATION, {"size": 4})
    assert found.enabled
    assert found.kernel_ms < found.twin_ms
    monkeypatch.setattr(verdicts, "command", lambda *_: pytest.fail("checked twice"))
    assert verdicts.verdict(OPERATION, {"size": 4}) == found
    stored = json.loads(verdicts.cache_file().read_text())
    assert list(stored) == [verdicts.verdict_key(OPERATION, {"size": 4})]


def test_a_verdict_does_not_outlive_what_it_was_about(monkeypatch):
    broken(monkeypatch, "good")
    verdicts.verdict(OPERATION, {"size": 4})
    broken(monkeypatch, "wrong")
    assert not verdicts.verdict(OPERATION, {"size": 5}).enabled
    assert verdicts.verdict(OPERATION, {"size": 4}).enabled
    monkeypatch.setattr(verdicts, "system", lambda: "macOS 99.0")
    assert not verdicts.verdict(OPERATION, {"size": 4}).enabled


def test_a_verdict_ends_with_the_code_that_launches(monkeypatch):
    broken(monkeypatch, "good")
    before = verdicts.verdict_key(OPERATION, {"size": 4})
    monkeypatch.setattr(registry.inspect, "getsource", lambda module: "another grid")
    assert verdicts.verdict_key(OPERATION, {"size": 4}) != before


def test_doctor_checks_again_what_failed_once(monkeypatch):
    operation, shape = registry.operations()["accept"], {"length": 256}
    monkeypatch.setattr(registry, "available", lambda: True)
    monkeypatch.setattr("mlx_dgemma.kernels.report.published_shapes", lambda: {"accept": shape})
    broken(monkeypatch, "crashes")
    assert not verdicts.verdict(operation, shape).enabled
    broken(monkeypatch, "good")
    assert not verdicts.verdict(operation, shape).enabled
    told = {entry["name"]: entry["status"] for entry in report(check=True)["operations"]}
    assert told["accept"].startswith("kernel: wins")
    assert verdicts.verdict(operation, shape).enabled


@pytest.mark.parametrize("content", ["", "[]", '{"a": {"surprise": 1}}', '{"a": 3}'])
def test_a_damaged_cache_counts_as_empty(content):
    verdicts.cache_file().parent.mkdir()
    verdicts.cache_file().write_text(content)
    assert verdicts.remembered() == {}


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(verdicts, "cache_file", lambda: tmp_path / "file" / "kernels.json")
    broken(monkeypatch, "good")
    assert verdicts.verdict(OPERATION, {}).enabled


def test_modes(monkeypatch):
    on_metal = dict.fromkeys(("off", "auto", "force"), False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(registry, "_verdict", lambda name, shape: True)
    for mode in on_metal:
        monkeypatch.setenv("MLX_DGEMMA_KERNELS", mode)
        on_metal[mode] = registry.use(OPERATION, {}, True)
        assert not registry.use(OPERATION, {}, False)
    assert on_metal == {"off": False, "auto": True, "force": True}
    monkeypatch.setattr(registry, "_verdict", lambda name, shape: False)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "auto")
    assert not registry.use(OPERATION, {}, True)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "fast")
    with pytest.raises(InputError, match="off, auto or force"):
        registry.mode()


def test_prompts_of_many_lengths_need_few_checks(monkeypatch):
    checked = set()
    monkeypatch.setattr(registry, "available", lambda: True)
    monkeypatch.setattr(registry, "_verdict", lambda *key: bool(checked.add(key)))
    for name in ("tokens", "length"):
        for count in range(1, 2049):
            registry.use(OPERATION, {name: count, "width": 704}, True)
    assert len(checked) == 2 * 3
    classes = {name: registry.shape_class(shape) for name, shape in published_shapes().items()}
    assert classes == published_shapes()


@pytest.mark.parametrize("name", sorted(registry.operations()))
def test_each_kernels_page_says_how_far_it_was_checked(name):
    """Until somebody sends a report from hardware, which is then kept in tests/hardware."""
    page = inspect.getdoc(inspect.getmodule(registry.operations()[name].probes))
    reports = list((Path(__file__).parents[1] / "hardware").glob("*.json"))
    assert (EVIDENCE in page) == (not reports)


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has Metal")
def test_without_metal_the_twins_run(monkeypatch):
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "force")
    assert not registry.use(OPERATION, {}, True)
    told = report(check=True)
    assert told["metal"] is False
    assert {operation["name"] for operation in told["operations"]} == set(published_shapes())
    assert all("no Metal device" in operation["status"] for operation in told["operations"])
    json.dumps(told)


def test_the_report_tells_each_verdict(monkeypatch):
    monkeypatch.setattr(registry, "available", lambda: True)
    operation = registry.operations()["accept"]
    broken(monkeypatch, "wrong")
    verdicts.verdict(operation, {"length": 256})
    told = {entry["name"]: entry for entry in report()["operations"]}
    assert told["accept"]["status"].startswith("twin: probe 0")
    assert list(told["accept"]["verdicts"]) == ["length=256"]
    assert told["router"]["status"] == "not checked yet"
