"""Questions about a state, with answers known: yes or no, one of several options, a level.

The bundled checkpoint was not trained on them; an adapter is, by `examples/fine_tune/questions.py`.
A question has the JSON form of `POST /v1/systemone`. Each has one right answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_dgemma.demo.tasks import words
from mlx_dgemma.demo.tasks.example import is_held_out

_KINDS = {  # orange is a fruit and a color
    kind: [word for word in known if word != "orange"] for kind, known in words.WORDS.items()
}


@dataclass(frozen=True)
class QuestionExample:
    """A state and one question about it.

    right: index of the answer: of yes and no, of the options, of the levels.
    """

    task: str
    state: Any
    question: dict[str, Any]
    right: int

    @property
    def key(self) -> str:
        """State and question as one string: equal keys mean equal questions."""
        return json.dumps([self.state, self.question], sort_keys=True)


@dataclass(frozen=True)
class QuestionTask:
    """A family of questions in one form."""

    name: str
    draw: Callable[[random.Random], QuestionExample] = field(repr=False)

    def sample(self, rng: random.Random, *, held_out: bool = False) -> QuestionExample:
        """Draws a question that training may see; with held_out one that it never sees."""
        while is_held_out((example := self.draw(rng)).key) != held_out:
            pass
        return example

    def held_out(self, n: int, seed: int = 0) -> list[QuestionExample]:
        """Draws n questions that no training example asks; the seed decides them."""
        rng = random.Random(f"held out {self.name} {seed}")
        return [self.sample(rng, held_out=True) for _ in range(n)]


def adult(rng: random.Random) -> QuestionExample:
    """Whether the age of a record is 18 or more."""
    yes = rng.random() < 0.5
    age = rng.randint(18, 35) if yes else rng.randint(10, 17)
    record = {"name": rng.choice(words.NAMES), "age": age, "pet": rng.choice(words.PETS)}
    question = {"type": "noul", "instructions": f"Is {record['name']} an adult?"}
    return QuestionExample("adult", record, question, 0 if yes else 1)


def kind(rng: random.Random) -> QuestionExample:
    """What the words of a list are."""
    right = rng.choice(list(_KINDS))
    listed = ", ".join(rng.sample(_KINDS[right], 3))
    question = {"type": "choice", "instructions": "What are they?", "criteria": list(_KINDS)}
    return QuestionExample("kind", listed, question, list(_KINDS).index(right))


def age(rng: random.Random) -> QuestionExample:
    """The decades of a record's age."""
    right = rng.randrange(4)
    years = rng.randint(*((10, 19), (20, 39), (40, 59), (60, 79))[right])
    record = {"name": rng.choice(words.NAMES), "age": years, "city": rng.choice([*words.COUNTRIES])}
    levels = ["under 20", "20 to 39", "40 to 59", "60 and up"]
    question = {"type": "score", "instructions": "What is the age?", "criteria": levels}
    return QuestionExample("age", record, question, right)


QUESTIONS: dict[str, QuestionTask] = {
    task.name: task
    for task in (QuestionTask("adult", adult), QuestionTask("kind", kind), QuestionTask("age", age))
}
