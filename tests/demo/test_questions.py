"""The demo's questions: right answers by another way, held-out ones kept apart, data as asked."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dgemma import load
from mlx_dgemma.decisions.label_passes import _Reader
from mlx_dgemma.decisions.questions import read_questions
from mlx_dgemma.demo.tasks import is_held_out, words
from mlx_dgemma.demo.tasks.questions import QUESTIONS
from mlx_dgemma.prompt import encode_messages

ROOT = Path(__file__).parents[2]


def answer_of(example) -> int:
    """The right answer, from the state alone."""
    if example.task == "adult":
        return 0 if example.state["age"] >= 18 else 1
    if example.task == "age":
        return sum(example.state["age"] >= bound for bound in (20, 40, 60))
    (kind,) = (
        kind for kind, known in words.WORDS.items() if set(example.state.split(", ")) <= set(known)
    )
    return example.question["criteria"].index(kind)


@pytest.mark.parametrize("name", QUESTIONS)
def test_right_answers_are_right_and_every_answer_is_drawn(name):
    rng = random.Random(f"test {name}")
    examples = [QUESTIONS[name].sample(rng) for _ in range(200)]
    for example in examples:
        assert list(read_questions({"q": example.question})) == ["q"]
        assert example.right == answer_of(example)
    count = len(examples[0].question.get("criteria", "yn"))
    assert {example.right for example in examples} == set(range(count))


@pytest.mark.parametrize("name", QUESTIONS)
def test_held_out_questions_are_never_trained_on(name):
    held = QUESTIONS[name].held_out(30)
    assert [one.key for one in held] == [one.key for one in QUESTIONS[name].held_out(30)]
    rng = random.Random(1)
    trained = {QUESTIONS[name].sample(rng).key for _ in range(300)}
    assert not trained & {one.key for one in held}
    assert all(is_held_out(one.key) for one in held)


def test_the_data_set_holds_the_prompts_that_decide_reads(tmp_path):
    """Each line's prompt is what a reader of its state sees, and its answer a label."""
    script = ROOT / "examples/fine_tune/questions.py"
    subprocess.run([sys.executable, str(script), str(tmp_path), "--examples", "40"], check=True)
    model, tokenizer = load()
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert len(lines) == 40
    for line in lines[:5]:
        user, assistant = json.loads(line)["messages"]
        state, text = user["content"].split("\n\n", 1)
        reader = _Reader(model, tokenizer, state, {})
        assert [*reader._prefix.ids, *reader._question_ids(text)] == encode_messages(
            tokenizer, [user]
        )
        (label,) = tokenizer.encode(assistant["content"])
        assert tokenizer.decode([label]) in "YNABCD"
