"""Runs tasks of lm-evaluation-harness and makes one report of all runs: what was right beside what
it cost, and every question's values, by which two reports can be compared.

A report holds no text of a data set: questions are named by task, number and a digest.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import statistics
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

from mlx_dgemma.errors import InputError
from mlx_dgemma.evaluation import harness as harness_module
from mlx_dgemma.evaluation.harness import Asked, Harness
from mlx_dgemma.evaluation.several_replies import Answer

logging.getLogger("lm_eval").setLevel(logging.WARNING)


class Tasks(NamedTuple):
    """names: the tasks meant. manager: lm-eval's, which knows their files."""

    names: list[str]
    manager: TaskManager


def find_tasks(tasks: Sequence[str], include: str | None) -> Tasks:
    """The tasks meant; InputError for a name that is not known.

    include: a folder with task files. lm-eval's own, of which it reads thousands, are looked
    through only where a name is not among those.
    """
    if include is not None and not os.path.isdir(include):
        raise InputError(f"--include-path {include} is no folder with task files.")
    for defaults in (False, True) if include is not None else (True,):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        known = [[t] if os.path.isfile(t) else manager.match_tasks([t]) for t in tasks]
        if all(known):
            return Tasks(list(dict.fromkeys(name for names in known for name in names)), manager)
    missing = tasks[known.index([])]
    raise InputError(
        f"lm-eval has no task {missing!r}: `lm-eval ls tasks` lists its own, and "
        "--include-path FOLDER adds yours."
    )


@dataclass(frozen=True)
class Plan:
    """shots: in the prompt; None is the task's. limit: questions of each task; None is all.
    multiturn: shots as turns of a conversation. unsafe: run tasks that execute what the model
    wrote. system_prompt: before every question. texts: keep replies in the report."""

    tasks: Tasks
    shots: int | None = None
    limit: int | None = None
    multiturn: bool = False
    unsafe: bool = False
    system_prompt: str | None = None
    texts: bool = False


def evaluate(harness: Harness, plan: Plan) -> dict[str, Any]:
    """{"tasks": ..., "samples": ...}, JSON-ready.

    tasks: by name, every metric as "metric,filter" -> {"value": mean over runs of lm-eval's own
    figure, "error": standard error over questions, "runs": each run's}, and under "cost" what
    replies took. samples: every question's mean values, by which two reports are paired.

    Raises InputError for what lm-eval cannot prepare, such as data that cannot be fetched, and for
    a task that fails while it is run, such as one with a metric that does not exist.
    """
    loaded = _load(harness, plan)
    runs = []
    for run in range(harness.manner.runs):
        harness.run = run
        _seed(harness.manner.seed)
        with _tasks_failures(plan.tasks.names):
            runs.append(
                lm_eval.evaluate(
                    harness,
                    loaded,
                    limit=plan.limit,
                    system_instruction=plan.system_prompt,
                    apply_chat_template=harness.manner.chat,
                    fewshot_as_multiturn=plan.multiturn,
                    confirm_run_unsafe_code=plan.unsafe,
                    bootstrap_iters=0,
                )
            )
    samples = _samples(runs, harness, plan)
    return {"tasks": _tasks(runs, samples, harness), "samples": samples}


def _load(harness: Harness, plan: Plan) -> Any:
    """The tasks with their data, as `lm_eval.simple_evaluate` sets them up; that also asks pip and
    git about this environment, which takes a quarter of a minute."""
    names, manager = plan.tasks
    _seed(harness.manner.seed)  # some tasks shuffle their choices when they are loaded
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar per file
            loaded = manager.load(names)
    except Exception as error:  # whatever a task's own code, its data and their host raise
        raise InputError(f"lm-eval cannot prepare {_why(names, error)}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not plan.unsafe:
            raise InputError(
                f"{name} executes what the model writes: where that may happen, add "
                "--confirm-run-unsafe-code."
            )
        own = task.get_config("num_fewshot")
        if plan.shots is not None and own != 0:
            task.set_config(key="num_fewshot", value=plan.shots)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=harness.manner.seed)
    return loaded


@contextlib.contextmanager
def _tasks_failures(names: Sequence[str]) -> Iterator[None]:
    """Makes one sentence of what a task's own code raises; what the model raises goes through."""
    try:
        yield
    except Exception as error:
        files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
        if harness_module.__file__ in files:
            raise
        raise InputError(f"lm-eval cannot evaluate {_why(names, error)}") from error


def _why(names: Sequence[str], error: Exception) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{', '.join(names)}: {type(error).__name__}: {first[0].rstrip('.')}."


def _seed(seed: int) -> None:
    """lm-eval and its tasks draw shots and orders from the global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _samples(runs: Sequence[Any], harness: Harness, plan: Plan) -> list[dict[str, Any]]:
    """One entry per question and filter: its metrics' means over the runs, and its mean cost."""
    answers = defaultdict[tuple[str, int], list[tuple[Asked, Answer]]](list)
    for place, answer in harness.answers.items():
        answers[place.task, place.document].append((place, answer))
    found = []
    for task, questions in runs[0]["samples"].items():
        for position, question in enumerate(questions):
            same = [run["samples"][task][position] for run in runs]
            given = answers[task, question["doc_id"]]
            entry = {
                "task": task,
                "question": question["doc_id"],
                "digest": question["doc_hash"][:16],
                "filter": question["filter"],
                "values": {
                    name: statistics.fmean(float(one[name]) for one in same)
                    for name in question["metrics"]
                    if all(isinstance(one[name], int | float) for one in same)
                },
                **_cost([answer for _, answer in given]),
            }
            if plan.texts:
                entry["replies"] = [answer.text for _, answer in sorted(given, key=lambda g: g[0])]
            found.append(entry)
    return found


def _cost(answers: Sequence[Answer]) -> dict[str, Any]:
    """Means over replies; empty for scored texts, which take no denoising step."""
    if not answers:
        return {}
    finishes = [answer.finish for answer in answers]
    steps = [sum(finish.steps_per_block) for finish in finishes]
    tokens = [finish.generated_tokens for finish in finishes]
    return {
        "steps": statistics.fmean(steps),
        "steps_per_block": sum(steps) / max(1, sum(finish.blocks for finish in finishes)),
        "tokens": statistics.fmean(tokens),
        "tokens_per_forward": sum(tokens) / max(1, sum(steps)),
        "seconds": statistics.fmean(f.prefill_seconds + f.denoise_seconds for f in finishes),
        "unfinished": statistics.fmean(finish.reason == "length" for finish in finishes),
    }


def _tasks(
    runs: Sequence[Any], samples: Sequence[dict[str, Any]], harness: Harness
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task, values in runs[0]["results"].items():
        metrics = {}
        for name, value in values.items():
            if "," not in name or "_stderr," in name or not isinstance(value, int | float):
                continue
            metric, _, filtered = name.partition(",")
            own = [
                sample["values"][metric]
                for sample in samples
                if sample["task"] == task
                and sample["filter"] == filtered
                and metric in sample["values"]
            ]
            each = [float(run["results"][task][name]) for run in runs]
            metrics[name] = {
                "value": statistics.fmean(each),
                "error": statistics.stdev(own) / len(own) ** 0.5 if len(own) > 1 else None,
                "runs": each,
            }
        given = [answer for place, answer in harness.answers.items() if place.task == task]
        questions = {sample["question"] for sample in samples if sample["task"] == task}
        found[task] = {
            "questions": len(questions),
            "metrics": metrics,
            "cost": _cost(given) or None,
            "version": runs[0]["versions"].get(task),
            "shots": runs[0]["n-shot"].get(task),
        }
    return found
