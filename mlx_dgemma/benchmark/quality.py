"""Is it right, and in how many decoder passes: fixed questions that a program can judge.

The questions are the demo's held-out ones, or those of `questions` for a large model, drawn from
one seed, so that two machines, models, presets or precisions answer the same. The demo knows the
forms of its own; a large model may know the answer and miss the form, which counts as wrong here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mlx_dgemma.benchmark.judged_questions import QUESTIONS, questions
from mlx_dgemma.decoding.events import Commit, Finish
from mlx_dgemma.demo.tasks import TASKS, Example, held_out
from mlx_dgemma.errors import InputError
from mlx_dgemma.generate import stream_generate
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer

SEED = 2026
MAX_TOKENS = 200


class Answer(NamedTuple):
    """One question's outcome.

    steps: per block. computed: canvas positions per decoder pass. fell_back: blocks that were left
    to the reference. text: what was answered.
    """

    right: bool
    steps: tuple[int, ...]
    tokens: int
    seconds: float
    computed: tuple[int, ...] = ()
    fell_back: int = 0
    text: str = ""


def ask(model: Model, tokenizer: Tokenizer, example: Example, **options: Any) -> Answer:
    """One question through `stream_generate`, judged by its own verifier."""
    events = list(
        stream_generate(
            model,
            tokenizer,
            example.messages,
            tools=example.tools,
            enable_thinking=example.enable_thinking,
            **options,
        )
    )
    commits = [event for event in events if isinstance(event, Commit)]
    finish = events[-1]
    assert isinstance(finish, Finish)
    text = "".join(commit.text for commit in commits)
    thought = "".join(commit.thinking for commit in commits)
    if any(commit.tool_calls for commit in commits):
        text = tokenizer.decode([token for commit in commits for token in commit.ids])
    right = example.verify(text, thought) if thought else example.verify(text)
    return Answer(
        right,
        finish.steps_per_block,
        finish.generated_tokens,
        finish.denoise_seconds,
        finish.computed,
        sum(finish.fell_back),
        text,
    )


def measure(
    model: Model,
    tokenizer: Tokenizer,
    *,
    prompts: int = 20,
    tasks: Sequence[str] | None = None,
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
    **options: Any,
) -> dict[str, Any]:
    """Task -> share right with its standard error, denoising steps per block, tokens per forward,
    computed canvas positions per token.

    prompts: questions per task. tasks: all by default. track: wraps the tasks, to show progress.
    options: keywords of `stream_generate`. Raises InputError for an unknown task.
    """
    found: dict[str, Any] = {}
    for task in track(known_tasks(tasks)):
        answers = [
            ask(model, tokenizer, example, seed=seed, max_tokens=MAX_TOKENS, **options)
            for seed, example in enumerate(examples(task, prompts))
        ]
        found[task] = figures(answers)
    return found


def known_tasks(tasks: Sequence[str] | None) -> list[str]:
    """The tasks, the demo's by default; InputError for one that is none."""
    for task in tasks or ():
        if task not in TASKS and task not in QUESTIONS:
            names = ", ".join([*TASKS, *QUESTIONS])
            raise InputError(f"There is no task {task!r}; the tasks are {names}.")
    return list(TASKS) if tasks is None else list(tasks)


def examples(task: str, prompts: int) -> list[Example]:
    """The first questions of a task, the same everywhere."""
    if task in QUESTIONS:
        return questions(task, prompts, SEED)
    return list(held_out(task, prompts, seed=SEED))


def overall(figures: dict[str, Any]) -> dict[str, float]:
    """The mean over tasks of every figure; its error as if the tasks were independent."""
    count = len(figures)
    means = {
        name: statistics.fmean(task[name] for task in figures.values())
        for name in (
            "right",
            "steps",
            "tokens_per_forward",
            "positions_per_token",
            "ms_per_token",
        )
    }
    error = sum(task["error"] ** 2 for task in figures.values()) ** 0.5 / count
    sums = {name: sum(task[name] for task in figures.values()) for name in ("fell_back", "n")}
    return {**means, "error": error, **sums}


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """What `measure` says of a task's answers."""
    count = len(answers)
    share = statistics.fmean(answer.right for answer in answers)
    steps = [step for answer in answers for step in answer.steps]
    tokens = sum(answer.tokens for answer in answers)
    computed = sum(sum(answer.computed) for answer in answers)
    return {
        "right": share,
        "error": (share * (1 - share) / count) ** 0.5,
        "steps": statistics.fmean(steps),
        "tokens_per_forward": tokens / max(1, sum(steps)),
        "positions_per_token": computed / max(1, tokens),
        "fell_back": sum(answer.fell_back for answer in answers),
        "seconds": sum(answer.seconds for answer in answers),
        "ms_per_token": sum(answer.seconds for answer in answers) / max(1, tokens) * 1e3,
        "n": count,
    }
