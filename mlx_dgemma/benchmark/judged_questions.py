"""Questions for a large model that a program can judge: arithmetic, JSON, code that runs, lists.

Each is drawn from a seed, so that two machines ask the same. The judges are strict about what was
asked and forgiving about what surrounds it: a fence around code, a sentence before a number.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from mlx_dgemma.benchmark.code_judge import passes
from mlx_dgemma.demo.tasks import Example

_FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_NAMES = ("Ada", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Igor", "Julia")
_TOWNS = ("Graz", "Lyon", "Oslo", "Porto", "Riga", "Turin", "Utrecht", "Zadar")


def questions(task: str, count: int, seed: int) -> list[Example]:
    """The first `count` questions of a task; KeyError for a task that is none."""
    make, found = QUESTIONS[task], []
    for number in range(count):
        prompt, judge = make(random.Random(f"{task} {seed} {number}"), number)
        found.append(Example(task, [{"role": "user", "content": prompt}], "", judge))
    return found


_Made = tuple[str, Callable[[str], bool]]  # a prompt, and the judge of its answer


def _arithmetic(draw: random.Random, number: int) -> _Made:
    a, b, c = draw.randint(12, 98), draw.randint(3, 48), draw.randint(2, 19)
    forms = (
        (f"What is {a} * {b} + {c}?", a * b + c),
        (f"What is ({a} + {b}) * {c}?", (a + b) * c),
        (
            f"A crate holds {b} bottles. {a} crates arrive and {c} bottles are broken. How many "
            "bottles are whole?",
            a * b - c,
        ),
        (
            f"A train leaves at {8 + c % 5}:{b:02d} and travels for {a} minutes. At which minute "
            "of its hour does it arrive?",
            (a + b) % 60,
        ),
    )
    prompt, expected = forms[number % len(forms)]
    return (
        prompt + " Answer with the number alone.",
        lambda text: (
            bool(found := _NUMBER.findall(text)) and float(found[-1].replace(",", "")) == expected
        ),
    )


def _json(draw: random.Random, number: int) -> _Made:
    name, town, age = draw.choice(_NAMES), draw.choice(_TOWNS), draw.randint(18, 80)
    count = draw.randint(2, 4)

    def judge(text: str) -> bool:
        try:
            found: Any = json.loads(_inside(text))
        except (ValueError, RecursionError):
            return False
        if not isinstance(found, dict) or set(found) != {"name", "age", "town", "hobbies"}:
            return False
        hobbies = found["hobbies"]
        listed = isinstance(hobbies, list) and all(isinstance(one, str) for one in hobbies)
        return (
            (found["name"], found["age"], found["town"]) == (name, age, town)
            and listed
            and len(set(hobbies)) == count
        )

    prompt = (
        f"Write a JSON object about {name}, who is {age} and lives in {town}, with the keys name, "
        f"age (a number), town and hobbies (a list of {count} different strings that you make up). "
        "Answer with the JSON alone."
    )
    return prompt, judge


# What a function must do, and a reference of it; `k` is drawn.
_FUNCTIONS: tuple[tuple[str, Callable[[Any, int], Any], tuple[Any, ...]], ...] = (
    ("returns the sum of the multiples of {k} from 1 to n",
     lambda n, k: sum(range(k, n + 1, k)), (1, 60, 100)),
    ("takes a text and returns how many of its words have at least {k} letters",
     lambda s, k: sum(len(word) >= k for word in s.split()),
     ("", "a bc def ghij", "three small elephants")),
    ("takes a list of integers and returns those greater than {k}, in ascending order",
     lambda x, k: sorted(one for one in x if one > k), ([], [9, 1, 12, 4], [3, 3, 30])),
    ("takes a text and returns it with its words in reverse order, separated by one space",
     lambda s, k: " ".join(reversed(s.split())), ("one", "a b  c", "the old fox")),
    ("returns whether the positive integer n is prime",
     lambda n, k: n > 1 and all(n % d for d in range(2, n)), (1, 2, 9, 31, 91)),
    ("takes a list of integers and returns the largest difference between two of them, or 0 for "
     "fewer than two",
     lambda x, k: max(x) - min(x) if len(x) > 1 else 0, ([], [5], [4, -3, 9])),
    ("takes a text and returns a dictionary from each letter in it to how often it occurs, "
     "ignoring everything else and upper case",
     lambda s, k: {c: s.lower().count(c) for c in s.lower() if c.isalpha()},
     ("", "Abba!", "x y X")),
    ("returns the list of the first n Fibonacci numbers, beginning with 0 and 1",
     lambda n, k: _fibonacci(n), (0, 1, 2, 9)),
)  # fmt: skip


def _fibonacci(n: int) -> list[int]:
    found = [0, 1]
    while len(found) < n:
        found.append(found[-1] + found[-2])
    return found[:n]


def _code(draw: random.Random, number: int) -> _Made:
    task, reference, inputs = _FUNCTIONS[number % len(_FUNCTIONS)]
    k = draw.randint(2, 6)
    cases = [(given, reference(given, k)) for given in inputs]
    prompt = f"Write a Python function f that {task.format(k=k)}. Answer with the code alone."
    return prompt, lambda text: passes(_inside(text), cases)


def _list(draw: random.Random, number: int) -> _Made:
    kind = draw.choice(("animals", "countries", "vegetables", "musical instruments", "cities"))
    count = draw.randint(4, 9)

    def judge(text: str) -> bool:
        lines = [line.strip().lower() for line in text.strip().splitlines() if line.strip()]
        plain = all(re.fullmatch(r"[^\W\d_][\w' .-]*", line) for line in lines)
        return plain and len(lines) == count == len(set(lines)) and lines == sorted(lines)

    prompt = (
        f"List {count} {kind} in alphabetical order, one a line, without numbers or bullets, and "
        "nothing else."
    )
    return prompt, judge


QUESTIONS: dict[str, Callable[[random.Random, int], _Made]] = {
    "arithmetic": _arithmetic,
    "json object": _json,
    "code": _code,
    "alphabet": _list,
}


def _inside(text: str) -> str:
    """What stands in the first fence, or else the whole text."""
    fenced = _FENCE.search(text)
    return (fenced.group(1) if fenced else text).strip()
