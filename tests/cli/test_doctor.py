"""`mlx_dgemma.doctor` on machines we do not have."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mlx_dgemma.cli.doctor import concerns, examine, main, show, verdict
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.kernels import dispatch, verdicts
from mlx_dgemma.kernels.self_checks import Request
from mlx_dgemma.kernels.table import operations
from mlx_dgemma.machine.hardware import Conditions, Machine, conditions, machine

GIB = 1 << 30
BIT4 = 17_601_119_960


def mac(gibibytes: int, **changed: object) -> Machine:
    facts: dict[str, object] = {
        "system": "macOS 15.5",
        "architecture": "arm64",
        "native": True,
        "chip": "Apple M3 Max",
        "memory": gibibytes * GIB,
        "working_set": gibibytes * GIB * 2 // 3,
        "metal": True,
        **changed,
    }
    return replace(machine(), **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("this", "fits"),
    [
        (mac(16), "no"),
        (mac(24), "tight"),
        (mac(24, wired_limit=20 * GIB), "yes"),
        (mac(36), "yes"),
        (mac(36, memory=None), "unknown"),
        (mac(24, metal=False), "yes"),
    ],
)
def test_whether_the_4bit_model_fits(this: Machine, fits: str) -> None:
    assert verdict(BIT4, this) == fits


def test_what_stands_in_the_way() -> None:
    assert concerns(mac(36)) == []
    assert "Rosetta" in concerns(mac(36, native=False))[0]
    assert "no Metal" in concerns(mac(36, metal=False))[0]
    assert "cannot be imported" in concerns(mac(36, mlx=None))[0]
    assert "too old" in concerns(mac(36, system="macOS 13.6"))[0]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_page_names_the_machine_the_models_and_the_kernels(width: int) -> None:
    stream = io.StringIO()
    show(examine(mac(24)), Console(file=stream, width=width))
    page = stream.getvalue()
    assert "Apple M3" in page
    assert "tight" in page
    assert "iogpu.wired_limit_mb" in page
    assert "row_statistics" in page
    assert "not yet run" in page.replace("\n", " ")


def on_a_mac(pages: dict[tuple[str, ...], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS' commands answer with these pages; every other fails."""

    def run(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        if command[1:] not in pages:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, pages[command[1:]], "")

    monkeypatch.setattr("mlx_dgemma.machine.hardware.sys.platform", "darwin")
    monkeypatch.setattr("mlx_dgemma.machine.hardware.subprocess.run", run)


BATTERY = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t80%; discharging"
SETTINGS = "System-wide power settings:\nCurrently in use:\n lowpowermode         1\n sleep 1"
CALM = "Note: No thermal warning level has been recorded\nNote: No performance warning level"
PRESSURE = ("-n", "kern.memorystatus_vm_pressure_level")


def test_what_slows_a_mac_down_now(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {PRESSURE: "2\n", ("-g", "batt"): BATTERY, ("-g",): SETTINGS, ("-g", "therm"): CALM}
    on_a_mac(pages, monkeypatch)
    assert conditions() == Conditions("warning", "no warning", "Battery Power", True)
    stream = io.StringIO()
    show(examine(mac(24)), Console(file=stream, width=120))
    assert (
        "memory pressure warning, heat: no warning, Battery Power, low power mode"
        in stream.getvalue()
    )


@pytest.mark.parametrize(
    ("page", "thermal"),
    [
        ("CPU_Scheduler_Limit \t= 100\nCPU_Speed_Limit \t= 63", "processor held to 63 %"),
        ("CPU_Speed_Limit = 100", "no warning"),
        ("Thermal warning level set to 2", "warning level 2"),
        ("something new", None),
    ],
)
def test_heat_as_macos_tells_it(
    page: str, thermal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_mac({("-g", "therm"): page}, monkeypatch)
    assert conditions() == Conditions(thermal=thermal)


def test_elsewhere_nothing_is_told() -> None:
    if sys.platform == "darwin":
        pytest.skip("this is a Mac")
    assert conditions() == Conditions()


def test_the_report_is_json_and_names_no_user(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    assert main(["--json", "--report", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(file.read_text())
    assert printed["models"] == written["models"]
    assert {"machine", "conditions", "models", "kernels", "concerns", "mlx_dgemma"} <= set(printed)
    assert str(Path.home()) not in file.read_text()


def test_a_report_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    # Said before the audit, which would take minutes: its model is not even looked for.
    assert main(["--report", "/no/such/folder/report.json", "--audit", "/no/model"]) == 2
    told = capsys.readouterr().err
    assert "cannot be written" in told
    assert "/no/model" not in told


def test_the_longest_context_is_told_both_ways() -> None:
    stream = io.StringIO()
    show(examine(mac(24)), Console(file=stream, width=120))
    assert "262,144 tokens take 5.7 GB; with --kv-bits 8 3.2 GB" in stream.getvalue()


@pytest.mark.parametrize(("model", "hidden"), [("", 2816), (str(CHECKPOINT), 128)])
def test_check_is_for_the_published_model_or_the_one_named(
    model: str, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []

    def prepare(requests: list[Request], *, again: bool) -> None:
        assert again
        asked.extend(requests)

    monkeypatch.setattr(dispatch, "prepare", prepare)
    command = ["--check", model, "--json"] if model else ["--check", "--json"]
    assert main(command) == 0
    assert {shape["hidden"] for one, shape in asked if one.name == "moe"} == {hidden}


def test_each_verdict_is_shown_with_its_reason_and_age(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verdicts, "cache_file", lambda: tmp_path / "kernels.json")
    operation = operations()["accept"]
    key = verdicts.verdict_key(operation, operation.shape("float32", 256))
    died = verdicts.Verdict(
        False, "the self-check died of signal 9", lasting=False, when=time.time() - 7300
    )
    verdicts.remember({key: died})
    stream = io.StringIO()
    show(examine(mac(24)), Console(file=stream, width=200))
    assert (
        "accept dtype=float32 length=256: twin, the self-check died of signal 9 "
        "(2 hours ago; will be checked again)"
    ) in stream.getvalue()
