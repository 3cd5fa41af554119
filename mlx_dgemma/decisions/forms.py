"""A question as the model sees it: a text that ends in labels, each of one token, to choose from.

A form shows the answers in one order and names each by a letter; yes and no name themselves. The
same question is asked in several orders, so that a liking for a letter or for a place cancels.
More than 20 options are asked as a tournament: in groups first, then between the groups' best.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlx_dgemma.decisions.questions import Choice, Noul, Question
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.prompt.tokenizer import Tokenizer

GROUP = 20  # options that one form lists
_YES_NO = (("yes", "no"), ("Yes", "No"), ("Y", "N"))


@dataclass(frozen=True)
class Form:
    """One way to ask a question.

    text: what follows the state. labels: token ids, one for each answer, in the order of
    `answers`: indices of the answers that the labels stand for.
    """

    text: str
    labels: tuple[int, ...]
    answers: tuple[int, ...]


def make_forms(
    tokenizer: Tokenizer, question: Question, orders: int, among: Sequence[int] | None = None
) -> list[Form]:
    """The question's forms, one for each of at most `orders` orders of its answers.

    among: of a choice, the options to choose from; None is all.

    Raises CheckpointError where the tokenizer has no single tokens for the labels.
    """
    if isinstance(question, Noul):
        return _yes_no(tokenizer, question, orders)
    if isinstance(question, Choice):
        lines = [name if text is None else f"{name} ({text})" for name, text in question.options]
        listed = list(range(len(lines))) if among is None else list(among)
        turns = min(orders, len(listed))
        shifts = [len(listed) * turn // turns for turn in range(turns)]
        rotations = [listed[shift:] + listed[:shift] for shift in shifts]
    else:
        lines = list(question.levels)
        upwards = list(range(len(lines)))
        rotations = [upwards, upwards[::-1]][:orders]
    letters = string.ascii_uppercase[: len(rotations[0])]
    labels = _single_tokens(tokenizer, letters)
    if labels is None:
        raise CheckpointError("This tokenizer has no single tokens for letters to answer with.")
    return [
        Form(
            _join(
                question.instructions,
                [f"{letter}: {lines[i]}" for letter, i in zip(letters, order, strict=True)],
                "Answer with one letter.",
            ),
            labels,
            tuple(order),
        )
        for order in rotations
    ]


def groups(count: int) -> list[range]:
    """Options 0 to count - 1 in groups of about equal size, none above GROUP."""
    number = -(-count // GROUP)
    bounds = [count * index // number for index in range(number + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _yes_no(tokenizer: Tokenizer, question: Noul, orders: int) -> list[Form]:
    for words in _YES_NO:
        labels = _single_tokens(tokenizer, words)
        if labels is None:
            continue
        meanings = (question.true, question.false)
        forms = []
        for order in ((0, 1), (1, 0))[:orders]:
            lines = [f"{words[i]}: {meanings[i]}" for i in order if meanings[i]]
            ending = f"Answer {words[order[0]]} or {words[order[1]]}."
            ids = tuple(labels[i] for i in order)
            forms.append(Form(_join(question.instructions, lines, ending), ids, order))
        return forms
    raise CheckpointError("This tokenizer has no single tokens for yes and no.")


def _single_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[int, ...] | None:
    """The token of each word; None unless every one is a single token of its own."""
    encoded = [tokenizer.encode(word) for word in words]
    ids = tuple(word[0] for word in encoded if len(word) == 1)
    return ids if len(set(ids)) == len(words) else None


def _join(instructions: str | None, lines: Sequence[str], ending: str) -> str:
    asked = [] if instructions is None else [instructions]
    return "Question: " + "\n".join([*asked, *lines, ending])
