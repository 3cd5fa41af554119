"""A kernel that fails in any way leaves its twin in place: checks, verdicts, their memory, modes,
the report.
"""

import inspect
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import pytest
from fake_self_check import FAKE

from mlx_dgemma.errors import InputError
from mlx_dgemma.kernels import checking, dispatch, registry, self_checks, verdicts
from mlx_dgemma.kernels.self_checks import Request, judged
from mlx_dgemma.kernels.table import operations
from mlx_dgemma.kernels.verdict_report import EVIDENCE, age, report

SCRIPT = Path(__file__).parent / "fake_self_check.py"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "cache_file", lambda: tmp_path / "cache" / "kernels.json")
    monkeypatch.setattr(self_checks, "TIMEOUT", 30.0)
    monkeypatch.setattr(self_checks, "command", lambda: [sys.executable, str(SCRIPT)])
    monkeypatch.delenv("MLX_DGEMMA_KERNELS", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


def fake(kind, size=4):
    return Request(FAKE, {"size": size, "kind": kind})


def one(kind, size=4, **keywords):
    return judged([fake(kind, size)], **keywords)[0]


def no_more_checks(monkeypatch):
    monkeypatch.setattr(self_checks, "_findings", lambda requests: pytest.fail("checked twice"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("does not compile", "Unable to build metal library"),
        ("aborts the compiler", "it does not compile"),
        ("wrong", "probe 0: error 0.5 above 0.001"),
        ("wrong integer", "error inf"),
        ("NaN", "error inf"),
        ("racy", "two launches gave different values"),
        ("slow", "no gain above 5 %"),
    ],
)
def test_a_kernel_that_is_wrong_or_slow_stays_off(kind, reason, monkeypatch):
    found = one(kind)
    assert not found.enabled
    assert found.lasting
    assert reason in found.reason
    no_more_checks(monkeypatch)
    assert one(kind) == found


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("crashes", "died of signal 11"),
        ("out of memory", "Insufficient Memory"),
        ("compiler is interrupted", "XPC_ERROR"),
        ("garbage", "no message"),
        ("silent", "no message"),
        ("fails", "ended with status 1: no such module"),
    ],
)
def test_what_another_try_may_find_otherwise_is_tried_again(kind, reason, monkeypatch):
    found = one(kind)
    assert not found.enabled
    assert not found.lasting
    assert reason in found.reason
    assert verdicts.remembered()[fake(kind).key] == found  # told, but
    asked = []
    monkeypatch.setattr(self_checks, "_findings", lambda requests: asked.extend(requests) or [])
    with pytest.raises(KeyError):
        one(kind)
    assert asked == [fake(kind)]


def test_a_kernel_that_hangs_is_given_up_and_tried_again(monkeypatch):
    monkeypatch.setattr(self_checks, "TIMEOUT", 5.0)
    found = judged([fake("good"), fake("hangs"), fake("good", 5)])
    assert [verdict.enabled for verdict in found] == [True, False, True]
    assert "did not finish within 5 s" in found[1].reason
    assert not found[1].lasting


def test_a_process_that_never_begins_is_waited_for_once(monkeypatch):
    monkeypatch.setattr(self_checks, "STARTING", 1.0)
    started = time.monotonic()
    found = judged([fake("never begins", size) for size in range(30)])
    assert time.monotonic() - started < 20
    assert {verdict.reason for verdict in found} == {"the self-check did not begin within 1 s"}


def test_a_process_that_cannot_start(monkeypatch):
    monkeypatch.setattr(self_checks, "command", lambda: ["/no/such/python"])
    found = judged([fake("good"), fake("good", 5)])
    assert all("could not start" in verdict.reason for verdict in found)
    assert not any(verdict.lasting for verdict in found)


def test_one_child_checks_everything_and_another_goes_on_after_a_crash(monkeypatch):
    started = []
    real = self_checks._answers
    monkeypatch.setattr(
        self_checks, "_answers", lambda asked: started.append(len(asked)) or real(asked)
    )
    kinds = ("good", "wrong", "crashes", "good", "slow")
    found = judged([fake(kind, size) for size, kind in enumerate(kinds)])
    assert [verdict.enabled for verdict in found] == [True, False, False, True, False]
    assert started == [5, 2]
    assert sum(verdict.lasting for verdict in found) == 4


def test_the_terminal_says_what_is_waited_for(caplog):
    with caplog.at_level(logging.WARNING, logger="mlx_dgemma.kernels"):
        judged([fake("good"), fake("wrong")])
        judged([fake("good")])
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("checking Metal kernels in 2 shapes, once on this machine")
    assert "MLX_DGEMMA_KERNELS=off" in first
    assert last.startswith("1 of 2 shapes run as kernels")


@pytest.mark.parametrize(("kernel_ms", "enabled"), [(0.94, True), (0.96, False), (1.0, False)])
def test_a_kernel_must_win_by_more_than_five_percent(kernel_ms, enabled):
    findings = checking.Findings(kernel_ms=kernel_ms, twin_ms=1.0)
    assert verdicts.judge(findings).enabled is enabled


def test_a_small_operation_is_timed_over_twenty_calls_that_wait_for_each_other(monkeypatch):
    graphs = []
    real = mx.eval

    def evaluate(outputs):
        text = Path(str(tmp) + f"{len(graphs)}.dot")
        mx.export_to_dot(str(text), *outputs)
        graphs.append(text.read_text().count('label ="Sin"'))
        real(outputs)

    from functools import partial
    from tempfile import mkdtemp

    tmp = Path(mkdtemp()) / "graph"
    monkeypatch.setattr(mx, "eval", evaluate)
    probe = registry.Probe(partial(mx.sin, mx.ones((4,))), partial(mx.sin, mx.ones((4,))), 0.0)
    checking.times(probe)
    assert graphs[:4] == [1, 1, 1, 1]  # once to warm up, once for its size
    assert graphs[4:] == [20] * (2 * checking._SAMPLES)


def test_a_good_kernel_is_enabled_and_remembered(monkeypatch):
    found = one("good")
    assert found.enabled
    assert found.kernel_ms < found.twin_ms
    assert abs(found.when - time.time()) < 60
    no_more_checks(monkeypatch)
    assert one("good") == found
    assert list(json.loads(verdicts.cache_file().read_text())) == [fake("good").key]


def test_a_verdict_does_not_outlive_what_it_was_about(monkeypatch):
    keys = {fake("good").key, fake("good", 5).key}
    monkeypatch.setattr(verdicts, "system", lambda: "macOS 99.0")
    keys.add(fake("good").key)
    other = registry.Operation("fake", FAKE.sizes, (), FAKE.supports, FAKE.probes)
    monkeypatch.setattr(registry.inspect, "getsource", lambda module: "another grid")
    keys.add(Request(other, {"size": 4, "kind": "good"}).key)
    assert len(keys) == 4


def test_an_app_without_source_goes_by_the_packages_version(monkeypatch):
    def absent(module):
        raise OSError("could not get source code")

    monkeypatch.setattr(registry.inspect, "getsource", absent)
    monkeypatch.setattr(registry, "__version__", "1.0")
    one = registry.Operation("fake", (), (), FAKE.supports, FAKE.probes).version
    monkeypatch.setattr(registry, "__version__", "1.1")
    assert registry.Operation("fake", (), (), FAKE.supports, FAKE.probes).version != one


def test_checking_again_overrules_what_is_remembered():
    request = fake("good")
    lost = verdicts.Verdict(False, "no gain above 5 %")
    verdicts.remember({request.key: lost})
    assert judged([request]) == [lost]
    assert judged([request], again=True)[0].enabled
    assert judged([request])[0].enabled


@pytest.mark.parametrize("frozen", [True, "macosx_app"])
def test_a_frozen_app_is_never_started_a_second_time(frozen, monkeypatch):
    monkeypatch.setattr(sys, "frozen", frozen, raising=False)
    monkeypatch.setattr(self_checks.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    found = judged([fake("good"), fake("wrong"), fake("out of memory")])
    assert [verdict.enabled for verdict in found] == [True, False, False]
    assert [verdict.lasting for verdict in found] == [True, True, False]


@pytest.mark.parametrize("executable", ["", None, "/Applications/Writer.app/Contents/MacOS/Writer"])
def test_a_program_that_embeds_python_is_not_started_either(executable, monkeypatch):
    assert self_checks.can_start_python()
    monkeypatch.setattr(sys, "executable", executable)
    assert not self_checks.can_start_python()


def test_an_app_that_did_not_survive_a_check_twice_stays_with_the_twin(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)

    class End(BaseException):
        """The process is gone."""

    def end(*_):
        raise End

    monkeypatch.setattr(checking, "check", end)
    for reason, lasting in ((self_checks.CUT_OFF, False), (self_checks.CUT_OFF_TWICE, True)):
        with pytest.raises(End):
            judged([fake("good")])
        left = verdicts.remembered()[fake("good").key]
        assert (left.reason, left.lasting, left.enabled) == (reason, lasting, False)
    assert judged([fake("good")]) == [left]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": {"surprise": 1}}', '{"a": 3}', "[" * 200_000, "\udcff"]
)
def test_a_damaged_cache_counts_as_empty(content):
    verdicts.cache_file().parent.mkdir()
    verdicts.cache_file().write_text(content, errors="surrogateescape")
    assert verdicts.remembered() == {}


def test_a_damaged_verdict_leaves_the_others_in_force():
    good = verdicts.Verdict(True, "wins", 0.0, 1.0, 2.0, when=3.0)
    damage = [{"when": "now"}, {"when": 10**400}, {"enabled": 1}, {"reason": None}, {"error": []}]
    stored = {f"bad {n}": {**asdict(good), **one} for n, one in enumerate(damage)}
    verdicts.cache_file().parent.mkdir()
    verdicts.cache_file().write_text(json.dumps({**stored, "good": asdict(good)}))
    assert verdicts.remembered() == {"good": good}


def test_a_pipe_in_the_cache_s_place_is_not_waited_for():
    verdicts.cache_file().parent.mkdir()
    os.mkfifo(verdicts.cache_file())
    assert verdicts.remembered() == {}


def test_a_cache_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "cache").mkdir()  # what no file can replace
    with pytest.raises(OSError, match="cache"):
        verdicts.write_cache(tmp_path / "cache", {})
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(verdicts, "cache_file", lambda: tmp_path / "file" / "kernels.json")
    assert one("good").enabled


@pytest.fixture
def on_metal(monkeypatch):
    monkeypatch.setattr(dispatch, "available", lambda: True)


def answered(monkeypatch, enabled):
    """Every check ends that way at once; the list of what was checked."""
    asked = []

    def findings(requests):
        asked.extend(requests)
        times = checking.Findings(kernel_ms=1.0, twin_ms=2.0 if enabled else 1.0)
        return [(request, times) for request in requests]

    monkeypatch.setattr(self_checks, "_findings", findings)
    return asked


@pytest.mark.parametrize("enabled", [True, False])
def test_modes(enabled, monkeypatch, on_metal):
    answered(monkeypatch, enabled)
    found = {}
    for mode in ("off", "auto", "force"):
        monkeypatch.setenv("MLX_DGEMMA_KERNELS", mode)
        found[mode] = dispatch.use(FAKE, 4, "good")
        refuses = registry.Operation("fake", (), (), lambda shape: False, FAKE.probes)
        assert not dispatch.use(refuses)
    assert found == {"off": False, "auto": enabled, "force": True}
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "fast")
    with pytest.raises(InputError, match="off, auto or force"):
        dispatch.mode()
    with pytest.raises(InputError, match="off, auto or force"):
        dispatch.use(FAKE, 4, "good")


def test_prompts_of_many_lengths_need_few_checks(monkeypatch, on_metal):
    asked = answered(monkeypatch, True)
    for name, most in dispatch.ROW_CLASSES.items():
        operation = registry.Operation(name, (name, "width"), (), lambda shape: True, FAKE.probes)
        for count in range(1, 3000):
            assert dispatch.use(operation, count, 704)
        found = [request.shape[name] for request in asked if request.operation is operation]
        assert found == list(most)


def test_a_decision_costs_a_few_microseconds(monkeypatch, on_metal):
    """Thirty layers ask about five times each, at every step."""
    answered(monkeypatch, True)
    dtype = mx.bfloat16
    dispatch.use(FAKE, 4, dtype)
    best = 1.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(500):
            dispatch.use(FAKE, 4, dtype)
        best = min(best, (time.perf_counter() - started) / 500)
    assert best < 6e-6


@pytest.mark.parametrize("name", sorted(name for name, one in operations().items() if one.kernels))
def test_each_kernels_page_says_how_far_it_was_checked(name):
    """Until somebody sends a report from hardware, which is then kept in tests/hardware."""
    page = inspect.getdoc(inspect.getmodule(operations()[name].probes))
    reports = list((Path(__file__).parents[1] / "hardware").glob("*.json"))
    assert (EVIDENCE in page) == (not reports)


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has Metal")
def test_without_metal_the_twins_run(monkeypatch):
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "force")
    assert not dispatch.use(FAKE, 4, "good")
    no_more_checks(monkeypatch)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "auto")
    dispatch.prepare([fake("good")])
    told = report()
    assert told["metal"] is False
    assert {operation["name"] for operation in told["operations"]} == set(operations())
    assert all("no Metal device" in operation["status"] for operation in told["operations"])
    json.dumps(told)


def test_the_report_tells_each_verdict_with_its_reason_and_age(on_metal):
    operation = operations()["accept"]
    now = time.time()
    for length, verdict in (
        (256, verdicts.Verdict(True, "wins with 1 ms against the twin's 2 ms", when=now - 7300)),
        (32, verdicts.Verdict(False, "the self-check died of signal 9", lasting=False, when=now)),
    ):
        request = Request(operation, operation.shape(mx.float32, length))
        verdicts.remember({request.key: verdict})
    told = {entry["name"]: entry for entry in report()["operations"]}
    assert told["accept"]["status"] == "kernel for 1 of 2 shapes"
    won, cut_off = told["accept"]["verdicts"]
    assert (won["shape"], won["age"]) == ("dtype=float32 length=256", "2 hours ago")
    assert (cut_off["reason"], cut_off["age"]) == ("the self-check died of signal 9", "just now")
    assert not cut_off["lasting"]
    assert told["router"]["status"] == "not checked yet"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(5, "just now"), (60, "1 minute ago"), (7200, "2 hours ago"), (200000, "2 days ago")],
)
def test_ages(seconds, told):
    assert age(time.time() - seconds) == told
