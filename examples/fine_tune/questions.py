"""Writes a data set for `mlx_dgemma.lora`: questions of the demo's tasks as `decide` asks them.

python examples/fine_tune/questions.py DATA --examples 2400            # options in the order given
python examples/fine_tune/questions.py DATA --examples 2400 --turned   # and in every other one
python examples/fine_tune/questions.py DATA --turned --more kind       # four of five of one task
"""

import argparse
import json
import random
from pathlib import Path

from mlx_dgemma import load
from mlx_dgemma.decisions.forms import GROUP, make_forms
from mlx_dgemma.decisions.question_prompt import question_messages, state_parts
from mlx_dgemma.decisions.questions import read_questions
from mlx_dgemma.demo.tasks.questions import QUESTIONS, QuestionExample


def conversation(tokenizer, example: QuestionExample, turned: bool, rng: random.Random) -> dict:
    """The question in one order of its answers, and the label of the right one."""
    question = read_questions({"it": example.question})["it"]
    forms = make_forms(tokenizer, question, orders=GROUP)
    order = rng.randrange(len(forms))
    form = forms[order if turned or example.question["type"] != "choice" else 0]
    label = form.labels[form.answers.index(example.right)]
    messages = question_messages(state_parts(example.state), form.text)
    reply = {"role": "assistant", "content": tokenizer.decode([label])}
    return {"messages": [*messages, reply]}


def draw(rng: random.Random, more: str | None, held_out: bool) -> QuestionExample:
    """A question of any task; of `more`, where it is named, in four of five cases."""
    task = more if more and rng.random() < 0.8 else rng.choice([q for q in QUESTIONS if q != more])
    return QUESTIONS[task].sample(rng, held_out=held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=2400)
    parser.add_argument("--turned", action="store_true", help="options in all orders")
    parser.add_argument("--more", choices=QUESTIONS, help="the task of four questions of five")
    arguments = parser.parse_args()

    (_, tokenizer), rng = load(), random.Random(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for split, share in {"train": 1.0, "valid": 0.05, "test": 0.05}.items():
        drawn = [
            draw(rng, arguments.more, split != "train")
            for _ in range(int(share * arguments.examples))
        ]
        lines = [
            json.dumps(conversation(tokenizer, example, arguments.turned, rng)) for example in drawn
        ]
        (arguments.folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
