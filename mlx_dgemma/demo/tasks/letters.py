"""Tasks with one right answer: reverse, sort, count, and a question worth a thought."""

import random
import string

from mlx_dgemma.demo.tasks.example import Example, ask


def _letters(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=rng.randint(low, high)))


def _one_answer(task: str, prompt: str, answer: str) -> Example:
    return Example(task, ask(prompt), answer, lambda text, thought=None: text.strip() == answer)


def reverse(rng: random.Random) -> Example:
    letters = _letters(rng, 4, 10)
    prompt = rng.choice(["Reverse {}", "Write {} backwards.", "Reverse the letters {}"])
    return _one_answer("reverse", prompt.format(letters), letters[::-1])


def sort(rng: random.Random) -> Example:
    letters = _letters(rng, 4, 10)
    prompt = rng.choice(["Sort {}", "Sort the letters {}", "Put {} in alphabetical order."])
    return _one_answer("sort", prompt.format(letters), "".join(sorted(letters)))


def count(rng: random.Random) -> Example:
    """Two-digit numbers in a row, three tokens a number: long answers fill several canvases."""
    start = rng.randint(10, 90)
    end = min(99, start + rng.randint(5, 30))
    prompt = rng.choice(
        ["Count from {} to {}", "Count from {} to {}.", "Write the numbers from {} to {}."]
    )
    answer = " ".join(str(number) for number in range(start, end + 1))
    return _one_answer("count", prompt.format(start, end), answer)


def first_letter(rng: random.Random) -> Example:
    """The first or last letter in the alphabet; the thought is the letters, sorted."""
    letters = "".join(rng.sample(string.ascii_uppercase, rng.randint(4, 8)))
    place = rng.choice(["first", "last"])
    prompt = rng.choice(
        ["Which letter of {} comes {} in the alphabet?", "Which of {} is {} in alphabetical order?"]
    ).format(letters, place)
    ordered = "".join(sorted(letters))
    right = ordered[0] if place == "first" else ordered[-1]
    thinking = rng.random() < 0.7

    def verify(text: str, thought: str | None = None) -> bool:
        thought_holds = thought is None or thought.strip() == (ordered if thinking else "")
        return text.strip() == right and thought_holds

    answer = f"<|channel>thought\n{ordered}\n<channel|>{right}" if thinking else right
    return Example("think", ask(prompt), answer, verify, enable_thinking=thinking)
