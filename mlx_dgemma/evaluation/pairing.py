"""Two reports of the same questions, paired question by question."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mlx_dgemma.errors import InputError
from mlx_dgemma.evaluation.significance import compare
from mlx_dgemma.machine.reports import read_report

ALL = "all tasks"
COSTS = ("steps_per_block", "tokens_per_forward", "seconds", "unfinished")


def read_result(path: str) -> dict[str, Any]:
    """A report of an evaluation with every part that a comparison reads; InputError otherwise."""
    found = read_report(path, ["evaluation"])
    try:
        costs = [task["cost"] for task in found["tasks"].values()]
        numbers = [cost[name] for cost in costs if cost is not None for name in COSTS]
        samples = found["samples"]
        numbers += [value for sample in samples for value in sample["values"].values()]
        names = [sample[name] for sample in samples for name in ("task", "digest", "filter")]
        whole = all(type(each) in (int, float) and math.isfinite(each) for each in numbers)
        whole = whole and all(isinstance(name, str) for name in names)
        whole = whole and all(type(sample["question"]) is int for sample in samples)
    except (AttributeError, KeyError, TypeError, OverflowError):
        whole = False
    if not whole:
        raise InputError(f"{path} is no whole result: a task or a question in it is damaged.")
    return found


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """ "task metric,filter" -> the Difference of b beside a as a dict; where several tasks have a
    metric, also over all their questions. The questions that only one has are left out.

    Raises InputError when the reports have no question in common.
    """
    first, second = _questions(a), _questions(b)
    pairs = defaultdict[tuple[str, str], list[tuple[float, float]]](list)
    tasks = defaultdict[str, set[str]](set)
    for key in sorted(first.keys() & second.keys()):
        task, metric = key[0], f"{key[3]},{key[2]}"
        pairs[task, metric].append((first[key], second[key]))
        pairs[ALL, metric].append((first[key], second[key]))
        tasks[metric].add(task)
    if not pairs:
        raise InputError(
            "The two results have no question in common: evaluate both with the same --tasks "
            "and --limit."
        )
    return {
        f"{task} {metric}": {
            "task": task,
            "metric": metric,
            **asdict(compare(*zip(*found, strict=True))),
        }
        for (task, metric), found in sorted(pairs.items())
        if task != ALL or len(tasks[metric]) > 1
    }


def _questions(report: Mapping[str, Any]) -> dict[tuple[str, str, str, str], float]:
    """(task, digest and number, filter, metric) -> value."""
    return {
        (
            sample["task"],
            f"{sample['digest']}#{sample['question']}",
            sample["filter"],
            metric,
        ): value
        for sample in report["samples"]
        for metric, value in sample["values"].items()
    }
