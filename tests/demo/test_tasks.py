"""The demo's tasks: judges take right answers only, and held-out prompts stay held out."""

import itertools
import random

import pytest

from mlx_dgemma.demo.tasks import PICTURE, TASKS, held_out, infill_examples, is_held_out
from mlx_dgemma.demo.tasks.grids import all_grids, is_grid
from mlx_dgemma.demo.tasks.pictures import COLORS, PLACES, SHAPES, Picture
from mlx_dgemma.demo.tasks.words import WORDS

ALL = {**TASKS, PICTURE.name: PICTURE}
N = 60


def samples(name, n=N):
    rng = random.Random(f"test {name}")
    return [ALL[name].sample(rng) for _ in range(n)]


@pytest.mark.parametrize("name", ALL)
def test_judges_accept_right_answers(name):
    assert all(example.verify(example.reply, example.thought) for example in samples(name))


@pytest.mark.parametrize("name", ALL)
def test_judges_reject_corrupted_answers(name):
    """Nothing, a cut answer, a doubled answer, an answer with something after it."""
    for example in samples(name):
        reply = example.reply
        assert not example.verify("")
        assert not example.verify(reply + reply)
        assert not example.verify(reply + "!")
        if len(reply) > 1:
            assert not example.verify(reply[:-1])


@pytest.mark.parametrize("name", [name for name, task in ALL.items() if not task.open_ended])
def test_one_answer_tasks_take_one_answer(name):
    examples = samples(name)
    for example, other in itertools.pairwise(examples):
        if example.reply != other.reply:
            assert not example.verify(other.reply)


def test_wrong_thoughts_are_rejected():
    thinking = [example for example in samples("think") if example.enable_thinking]
    assert thinking
    for example in thinking:
        assert example.verify(example.reply, example.thought)
        assert not example.verify(example.reply, example.thought[::-1])
        assert not example.verify(example.reply, "")


def test_open_tasks_take_other_answers():
    """A grid, a list, a sentence and a record that the generator did not draw."""
    for name, old, new in (
        ("sentence", " see ", " watch "),
        ("json", '"color": "red"', '"color": "blue"'),
    ):
        changed = [e for e in samples(name, 800) if old in e.answer]
        assert changed
        assert all(example.verify(example.answer.replace(old, new)) for example in changed)
    for example in samples("grid", 20):
        clues = example.messages[0]["content"].split("\n", 1)[1].replace("\n", "")
        fitting = [
            grid
            for grid in all_grids()
            if all(c in ("_", g) for c, g in zip(clues, grid, strict=True))
        ]
        assert len(fitting) >= 4
        assert all(
            example.verify("\n".join(g[i : i + 4] for i in range(0, 16, 4))) for g in fitting
        )


def test_a_list_keeps_the_ends_it_was_given():
    """Any sorted words between them will do; not another first word, nor a last one if named."""
    forms = set()
    for example in samples("list", 200):
        prompt, items = example.messages[0]["content"], example.answer.split(", ")
        known = next(words for words in WORDS.values() if set(items) <= set(words))
        bounded = " from " in prompt and " to " in prompt and prompt.startswith("Write")
        forms.add(bounded)
        for position in range(len(items)):
            low = items[position - 1] if position else ""
            high = items[position + 1] if position + 1 < len(items) else "~"
            others = [word for word in known if low < word < high and word != items[position]]
            free = position > 0 and not (bounded and position == len(items) - 1)
            for word in others:
                changed = [*items[:position], word, *items[position + 1 :]]
                assert example.verify(", ".join(changed)) is free
        assert not example.verify(", ".join(items[:-1]))
        assert not example.verify(", ".join([items[0], *items]))
    assert forms == {True, False}


def test_disagreement_is_rejected():
    for example in samples("sentence", 200):
        for right, wrong in ((" sees ", " see "), (" these ", " this "), (" two ", " one ")):
            if right in example.answer:
                assert not example.verify(example.answer.replace(right, wrong))
    for example in samples("json", 400):
        for right, wrong in (("France", "Japan"), ("Spain", "Italy"), ("Japan", "Peru")):
            if right in example.answer and '"city"' in example.answer:
                assert not example.verify(example.answer.replace(right, wrong))


def test_a_sudoku_has_one_solution_and_there_are_288_grids():
    assert len(all_grids()) == 288
    assert all(is_grid(grid) for grid in all_grids())
    for example in samples("sudoku", 20):
        clues = example.messages[0]["content"].split("\n", 1)[1].replace("\n", "")
        fitting = [
            grid
            for grid in all_grids()
            if all(c in ("_", g) for c, g in zip(clues, grid, strict=True))
        ]
        assert ["\n".join(g[i : i + 4] for i in range(0, 16, 4)) for g in fitting] == [
            example.answer
        ]


@pytest.mark.parametrize("name", ALL)
def test_held_out_prompts_are_never_trained_on(name):
    kept = {example.key for example in held_out(name, N)}
    assert all(is_held_out(key) for key in kept)
    assert not any(is_held_out(example.key) for example in samples(name, 300))


@pytest.mark.parametrize("name", ALL)
def test_seeds_decide_the_held_out_examples(name):
    first, again, other = (held_out(name, 12, seed) for seed in (5, 5, 6))
    assert [e.key for e in first] == [e.key for e in again]
    assert [e.key for e in first] != [e.key for e in other]


@pytest.mark.parametrize("held", [False, True])
def test_infill_texts_have_holes_and_are_judged(held):
    stream = infill_examples(random.Random(3), held_out=held)
    tasks = set()
    for _ in range(120):
        example = next(stream)
        tasks.add(example.task)
        assert is_held_out(example.text) == held
        assert example.verify(example.text)
        assert any(segment.hole for segment in example.segments)
        assert not example.verify(example.text + "x")
        assert all(
            a.hole != b.hole for a, b in zip(example.segments, example.segments[1:], strict=False)
        )
    assert tasks == {"sentence", "list", "json", "grid"}


def test_pictures_show_what_their_answers_say():
    """The shape's color is at its place and the ground's color in the other places."""
    for shape, color, place in itertools.product(SHAPES, COLORS, PLACES):
        image = Picture(shape, color, place).draw()
        for other, (across, down) in PLACES.items():
            pixel = image.getpixel((round(across * image.width), round(down * image.height)))
            assert pixel == (COLORS[color] if other == place else (255, 255, 255))
    areas = [
        sum(
            pixel != (255, 255, 255)
            for pixel in Picture(shape, "red", "in the center").draw().getdata()
        )
        for shape in ("square", "circle", "triangle")
    ]
    assert areas[0] > areas[1] > areas[2] > 0


def test_a_repeated_text_is_longer_than_a_canvas():
    assert all(len(example.answer) >= 24 for example in samples("repeat"))
    assert sum(len(example.answer) >= 32 for example in samples("repeat")) > N // 3
