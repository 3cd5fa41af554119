"""Merges the reports in studies/reports/ into the table of docs/performance.md.

    python studies/reports.py            # writes the table
    python studies/reports.py --check    # exit code 1 where the table is not what the reports say

Reports come from people with Macs. A file that is no report, or is none of this version, ends the
run before anything is written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.files import replacing
from mlx_dgemma.machine.reports import read_report

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- reports: written by studies/reports.py -->", "<!-- end of reports -->"
NONE = "No report has been sent yet."
HEAD = ("machine", "model, preset", "what was found", "mlx, mlx_dgemma", "file")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "studies" / "reports")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    try:
        page = arguments.page.read_text(encoding="utf-8")
        made = merged(page, table(arguments.folder))
        if not arguments.check:
            with replacing(arguments.page) as beside:
                beside.write_text(made, encoding="utf-8")
    except (DGemmaError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    return int(arguments.check and made != page)


def merged(page: str, rows: str) -> str:
    """The page with `rows` between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise DGemmaError(f"The page has no place for the table: put {BEGIN} and {END} into it.")
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def table(folder: Path) -> str:
    """A row for every finding of every report, by file name; DGemmaError for what is no report."""
    if not folder.is_dir():
        raise DGemmaError(f"There is no folder {folder}: name the reports' with --folder.")
    rows = [row for path in sorted(folder.glob("*.json")) for row in rows_of(path)]
    if not rows:
        return NONE
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def rows_of(path: Path) -> list[tuple[str, ...]]:
    """What one report says, in a row a finding; DGemmaError for one that lacks a part."""
    found = read_report(path)
    try:
        about = machine(found), model(found)
        return [
            (*about, finding, versions(found), f"`{path.name}`")
            for finding in FINDINGS[found["kind"]](found)
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DGemmaError(
            f"{path} is no whole report: a part of {found['kind']!r} is missing or damaged."
        ) from error


def cell(value: str) -> str:
    """Text that anyone may have sent, in one cell and nothing but text: no link either."""
    value = re.sub(r"://|\bwww\.", " ", value, flags=re.IGNORECASE)
    return " ".join(re.sub(r"[^\w .,:;+%±()/`'-]", " ", value).split())[:200]


def machine(found: Mapping[str, Any]) -> str:
    this = found["machine"]
    memory = this.get("memory")
    size = f", {memory / (1 << 30):.0f} GB" if isinstance(memory, int) else ""
    device = "Metal" if this.get("metal") else "CPU"
    return f"{this.get('chip') or 'unknown chip'}{size}, {this.get('system')}, {device}"


def model(found: Mapping[str, Any]) -> str:
    named = [found.get("model"), found.get("preset")]
    named += [f"kv-bits {found['kv_bits']}"] if found.get("kv_bits") else []
    return ", ".join(str(name) for name in named if name)


def versions(found: Mapping[str, Any]) -> str:
    return f"{found['machine'].get('mlx')}, {found.get('mlx_dgemma')}"


def _doctor(found: Mapping[str, Any]) -> list[str]:
    verdicts = [one for each in found["kernels"]["operations"] for one in each["verdicts"]]
    on = sum(one["enabled"] for one in verdicts)
    return [f"kernels: {on} of {len(verdicts)} checked shapes run"]


def _times(found: Mapping[str, Any]) -> list[str]:
    step = found["passes"]["step"]
    share = step["roofline_fraction"]
    reached = "" if share is None else f", {share:.0%} of the roofline"
    return [f"step {step['ms']:.1f} ± {step['spread_ms']:.1f} ms{reached}"]


def _quality(found: Mapping[str, Any]) -> list[str]:
    return [_judged("puzzles", found["quality"]["overall"])]


def _presets(found: Mapping[str, Any]) -> list[str]:
    return [_judged(f"{name}: puzzles", one["overall"]) for name, one in found["settings"].items()]


def _judged(what: str, mean: Mapping[str, Any]) -> str:
    return (
        f"{what} {mean['right']:.2f} ± {mean['error']:.2f} right, {mean['steps']:.1f} steps, "
        f"{mean['tokens_per_forward']:.1f} tokens per forward"
    )


def _guards(found: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {one['empty']:.0%} empty replies" for name, one in found["settings"].items()]


def _evaluation(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for task, values in found["tasks"].items():
        for name, metric in values["metrics"].items():
            error = "" if metric["error"] is None else f" ± {metric['error']:.3f}"
            cost = values["cost"] or {}
            spent = f", {cost['tokens_per_forward']:.1f} tokens per forward" if cost else ""
            of = f" (n {values['questions']})"
            lines.append(f"{task} {name} {metric['value']:.3f}{error}{of}{spent}")
    return lines


def _comparison(found: Mapping[str, Any]) -> list[str]:
    return [f"{name}: step {one['step_seconds'] * 1e3:.1f} ms" for name, one in
            found["compare"].items()]  # fmt: skip


FINDINGS = {
    "doctor": _doctor,
    "times": _times,
    "quality": _quality,
    "presets": _presets,
    "guards": _guards,
    "evaluation": _evaluation,
    "comparison": _comparison,
    "count": lambda _: [],  # counted, not measured
}

if __name__ == "__main__":
    sys.exit(main())
