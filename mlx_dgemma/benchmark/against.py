"""Two presets side by side: the same questions and seeds, by turns, so that a machine that grows
warm is warm for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mlx_dgemma.benchmark.quality import (
    MAX_TOKENS,
    Answer,
    ask,
    examples,
    figures,
    known_tasks,
    overall,
)
from mlx_dgemma.demo.tasks import Example
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer


class Pair(NamedTuple):
    """A question, which is the seed as well, and its answers by both presets."""

    task: str
    question: int
    first: Answer
    second: Answer


def side_by_side(
    model: Model,
    tokenizer: Tokenizer,
    presets: tuple[str, str],
    *,
    prompts: int = 20,
    tasks: Sequence[str] | None = None,
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
    **options: Any,
) -> list[Pair]:
    """Every question of every task by both presets; see `measure` for the keywords."""
    chosen, found = known_tasks(tasks), []

    def answer(example: Example, seed: int, side: int) -> Answer:
        given = {**options, "seed": seed, "max_tokens": MAX_TOKENS, "preset": presets[side]}
        return ask(model, tokenizer, example, **given)

    for side in (0, 1):  # the first pass of every shape is slower: not counted
        answer(examples(chosen[0], 1)[0], 0, side)
    for task in track(chosen):
        for number, example in enumerate(examples(task, prompts)):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            both = {side: answer(example, number, side) for side in order}
            found.append(Pair(task, number, both[0], both[1]))
    return found


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Of each task, and of all together ("all"): both sides' figures, and how they agree."""
    tasks = list(dict.fromkeys(pair.task for pair in pairs))
    found = {task: _of_task([pair for pair in pairs if pair.task == task]) for task in tasks}
    sides = {
        side: overall({task: found[task][side] for task in tasks}) for side in ("first", "second")
    }
    agreement = _agreement(pairs)
    return {"tasks": found, "all": {**sides, **agreement}, "questions": [*map(_record, pairs)]}


def _of_task(pairs: Sequence[Pair]) -> dict[str, Any]:
    return {
        "first": figures([pair.first for pair in pairs]),
        "second": figures([pair.second for pair in pairs]),
        **_agreement(pairs),
    }


def _agreement(pairs: Sequence[Pair]) -> dict[str, int]:
    """Questions by who was right, and how many had the same text."""
    right = [(pair.first.right, pair.second.right) for pair in pairs]
    return {
        "both": right.count((True, True)),
        "first_alone": right.count((True, False)),
        "second_alone": right.count((False, True)),
        "neither": right.count((False, False)),
        "same_text": sum(pair.first.text == pair.second.text for pair in pairs),
    }


def _record(pair: Pair) -> dict[str, Any]:
    """What a report says of a question: no text."""
    sides = {
        name: {
            "right": answer.right,
            "steps": list(answer.steps),
            "positions": sum(answer.computed),
            "tokens": answer.tokens,
            "seconds": answer.seconds,
            "fell_back": answer.fell_back,
        }
        for name, answer in (("first", pair.first), ("second", pair.second))
    }
    same = pair.first.text == pair.second.text
    return {"task": pair.task, "question": pair.question, "same_text": same, **sides}
