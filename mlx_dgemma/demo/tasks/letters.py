"""Tasks with one right answer: reverse, sort, count, repeat, and a question worth a thought."""

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
    """Four to nine numbers up to 30, upwards or downwards."""
    low = rng.randint(1, 27)
    high = min(30, low + rng.randint(3, 8))
    numbers = [str(number) for number in range(low, high + 1)]
    if rng.random() < 0.3:
        prompt = rng.choice(["Count down from {} to {}.", "Count backwards from {} to {}."])
        return _one_answer("count", prompt.format(high, low), " ".join(numbers[::-1]))
    prompt = rng.choice(
        ["Count from {} to {}", "Count from {} to {}.", "Write the numbers from {} to {}."]
    )
    return _one_answer("count", prompt.format(low, high), " ".join(numbers))


def repeat(rng: random.Random) -> Example:
    """More letters than one canvas holds: the answer goes over two."""
    letters = _letters(rng, 24, 44)
    prompt = rng.choice(["Repeat {}", "Write {} again.", "Copy the letters {}"])
    return _one_answer("repeat", prompt.format(letters), letters)


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
