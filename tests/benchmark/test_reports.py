"""Reports: one form for all that make them, refused when it is another, merged into the page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_dgemma.cli.benchmark.flags import main as benchmark
from mlx_dgemma.cli.doctor import main as doctor
from mlx_dgemma.errors import InputError, ResourceError
from mlx_dgemma.machine.reports import KINDS, SCHEMA, VERSION, read_report, report, write_report

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("reports", ROOT / "studies" / "reports.py")
assert SPEC is not None
assert SPEC.loader is not None
merge = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(merge)

MAC = {"chip": "Apple M0 | <b>", "memory": 64 << 30, "system": "macOS 15.5", "metal": True,
       "mlx": "0.32.4"}  # fmt: skip
MEAN = {"right": 0.91, "error": 0.03, "steps": 12.5, "tokens_per_forward": 6.25, "n": 20}
EXAMPLES: dict[str, dict[str, Any]] = {
    "doctor": {"kernels": {"operations": [{"verdicts": [{"enabled": True}, {"enabled": False}]}]}},
    "times": {"model": "4bit", "preset": "reference", "passes": {
        "step": {"ms": 151.3, "spread_ms": 2.1, "roofline_fraction": 0.62}}},
    "quality": {"model": "4bit", "kv_bits": 8, "quality": {"overall": MEAN}},
    "presets": {"model": "demo", "settings": {"reference": {"overall": MEAN}}},
    "guards": {"model": "demo", "settings": {"reroll": {"empty": 0.125}}},
    "evaluation": {"model": "4bit", "preset": "reference", "tasks": {"gsm8k": {
        "questions": 100, "cost": {"tokens_per_forward": 11.5},
        "metrics": {"exact_match,none": {"value": 0.8, "error": 0.04}}}}},
    "comparison": {"model": "4bit", "compare": {"mlx-vlm": {"step_seconds": 0.2}}},
    "count": {"model": "4bit"},
}  # fmt: skip
SAID = {
    "doctor": "kernels: 1 of 2 checked shapes run",
    "times": "step 151.3 ± 2.1 ms, 62% of the roofline",
    "quality": "puzzles 0.91 ± 0.03 right, 12.5 steps, 6.2 tokens per forward",
    "presets": "reference: puzzles 0.91 ± 0.03 right",
    "guards": "reroll: 12% empty replies",
    "evaluation": "gsm8k exact_match,none 0.800 ± 0.040 (n 100), 11.5 tokens per forward",
    "comparison": "mlx-vlm: step 200.0 ms",
}


def example(kind: str) -> dict[str, Any]:
    """An invented report, for tests alone."""
    return {**report(kind, **EXAMPLES[kind]), "machine": MAC}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{merge.BEGIN}\nold\n{merge.END}\nafter\n")
    return path


def test_what_makes_reports_makes_this_form(tmp_path: Path) -> None:
    assert doctor(["--json", "--report", str(tmp_path / "doctor.json")]) == 0
    assert benchmark(["--count", "--json", "--report", str(tmp_path / "count.json")]) == 0
    for kind in ("doctor", "count"):
        found = read_report(tmp_path / f"{kind}.json", [kind])
        assert (found["schema"], found["version"], found["kind"]) == (SCHEMA, VERSION, kind)
        assert str(Path.home()) not in json.dumps(found)


def test_a_model_s_folder_is_named_without_its_path(tmp_path: Path) -> None:
    from mlx_dgemma.checkpoint.hub import demo_path

    file = tmp_path / "count.json"
    assert benchmark(["--count", "--model", str(demo_path()), "--json", "--report", str(file)]) == 0
    assert read_report(file)["model"] == demo_path().name


def test_every_kind_is_merged_into_the_table(tmp_path: Path, page: Path) -> None:
    assert set(EXAMPLES) == set(KINDS) == set(merge.FINDINGS)
    for kind in KINDS:
        write_report(tmp_path / f"{kind}.json", example(kind))
    command = ["--folder", str(tmp_path), "--page", str(page)]
    assert merge.main([*command, "--check"]) == 1
    assert merge.main(command) == 0
    assert merge.main([*command, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    for kind, said in SAID.items():
        (row,) = [line for line in text.splitlines() if f"`{kind}.json`" in line]
        assert said in row
        assert "Apple M0 b , 64 GB, macOS 15.5, Metal" in row  # no markup of a sender's
        assert row.count(" | ") == len(merge.HEAD) - 1
    assert "kv-bits 8" in text
    assert "count.json" not in text


def test_the_page_says_what_the_folder_holds() -> None:
    assert merge.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": "other"}, "its schema is not 'mlx_dgemma.report'"),
        ({"version": 2}, "has version 2 of a report"),
        ({"kind": "song"}, "is a report of 'song'"),
        ({"machine": None}, "it has no machine"),
    ],
)
def test_another_form_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({**example("doctor"), **change}))
    with pytest.raises(InputError, match=sentence):
        read_report(path)


def test_what_is_no_json_and_what_lacks_a_part_end_the_merge(
    tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, before = ["--folder", str(tmp_path), "--page", str(page)], page.read_text()
    (tmp_path / "a.json").write_text("[1, ")
    assert merge.main(command) == 2
    assert "cannot be read as a report" in capsys.readouterr().err
    write_report(tmp_path / "a.json", {**example("times"), "passes": {}})
    assert merge.main(command) == 2
    assert f"{tmp_path / 'a.json'} is no whole report: a part of 'times'" in capsys.readouterr().err
    write_report(tmp_path / "a.json", {**example("evaluation"), "tasks": [1]})
    assert merge.main(command) == 2
    assert "a.json is no whole report" in capsys.readouterr().err
    assert page.read_text() == before


@pytest.mark.parametrize("place", ["no page", "a folder", "no folder of reports", "not text"])
def test_a_wrong_place_is_a_sentence(
    tmp_path: Path, page: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, named, before = tmp_path, page, page.read_bytes()
    if place == "no page":
        named = tmp_path / "none.md"
    elif place == "a folder":
        named = tmp_path
    elif place == "no folder of reports":  # which is not "no report has been sent"
        folder = tmp_path / "none"
    else:
        before = b"\xff\xfe"
        page.write_bytes(before)
    assert merge.main(["--folder", str(folder), "--page", str(named)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert page.read_bytes() == before
    assert list(tmp_path.iterdir()) == [page]


def test_a_sender_s_text_is_no_link_and_no_markup() -> None:
    sent = "https://evil.example/a www.evil.example a|b <script>x</script> [x](y) --> a@b.example"
    shown = merge.cell(sent)
    assert not any(sign in shown for sign in ("://", "www.", "|", "<", ">", "[", "@"))
    assert merge.cell("mlx-community/a-4bit, 62% ± 1.5") == "mlx-community/a-4bit, 62% ± 1.5"


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be written"):
        write_report(tmp_path / "none" / "a.json", example("doctor"))
    with pytest.raises(InputError, match="no regular file"):
        write_report(tmp_path, example("doctor"))
    assert list(tmp_path.iterdir()) == []


def test_the_issue_template_asks_for_commands_that_exist() -> None:
    import re
    import shlex

    from mlx_dgemma.cli import benchmark as benchmark_verb
    from mlx_dgemma.cli import doctor as doctor_verb

    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "report.yml").read_text()
    lines = re.findall(r"mlx_dgemma\.(\w+) (.+)", text)
    assert len(lines) == 3
    parsers = {"doctor": doctor_verb.build_parser, "benchmark": benchmark_verb.build_parser}
    for verb, flags in lines:
        assert parsers[verb]().parse_args(shlex.split(flags)).report
