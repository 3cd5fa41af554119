"""What the demo model forgets of its tasks when it learns a new one, and what keeps them.

    python studies/forgetting.py --out forgetting.json

The example's new task (examples/fine_tune/data.py) is trained in several ways: alone, with lines of
the old tasks among the new ones, right answers or the model's own, and more gently. Every old
task is judged on held-out prompts before and after, as is the new one on its test lines.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlx_dgemma import load
from mlx_dgemma.benchmark.quality import ask, figures, measure
from mlx_dgemma.decoding.events import Finish
from mlx_dgemma.demo.tasks import TASKS, Example
from mlx_dgemma.generate import stream_generate
from mlx_dgemma.training.run import prepare
from mlx_dgemma.training.settings import Settings

ROOT = Path(__file__).parents[1]
OLD = 20  # lines of each old task that are mixed in
TEXT = [name for name in TASKS if name != "tool"]  # whose replies are plain text
BASE = {
    "train": True, "iters": 150, "batch_size": 16, "rank": 16, "learning_rate": 3e-3,
    "encoder_weight": 0.0, "val_replies": 0, "steps_per_eval": 150, "val_batches": 1,
}  # fmt: skip
ARMS: dict[str, dict[str, Any] | None] = {
    "before": None,
    "as in the example": {},
    "with right answers of old tasks": {"mixed": "right"},
    "with own answers to old prompts": {"mixed": "own"},
    "the same, a third of the learning rate": {"mixed": "own", "learning_rate": 1e-3},
}


def old_lines(answers: str) -> list[str]:
    """Lines of the old tasks, with right answers, or what the model itself says ("own")."""
    generator = random.Random(11)
    model, tokenizer = load()
    lines = []
    for task in TEXT:
        for seed in range(OLD):
            example = TASKS[task].sample(generator)
            if answers == "own":
                events = stream_generate(model, tokenizer, example.messages, seed=seed)
                reply = "".join(e.text for e in events if not isinstance(e, Finish))
            else:
                reply = example.reply
            turn = {"role": "assistant", "content": reply}
            lines.append(json.dumps({"messages": [*example.messages, turn]}))
    return lines


def new_examples(folder: Path) -> list[Example]:
    """The new task's test lines, judged by their exact text."""
    found = []
    for line in (folder / "test.jsonl").read_text().splitlines():
        question, expected = json.loads(line)["messages"]
        answer = expected["content"]

        def verify(text: str, thought: str = "", answer: str = answer) -> bool:
            return text.strip() == answer

        found.append(Example("double", [question], answer, verify))
    return found


def judged(adapter: Path | None, data: Path, prompts: int, tasks: list[str]) -> dict[str, Any]:
    model, tokenizer = load(adapter_path=adapter)
    new = [ask(model, tokenizer, one, seed=n) for n, one in enumerate(new_examples(data))]
    return {"double": figures(new), **measure(model, tokenizer, prompts=prompts, tasks=tasks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=50, help="held-out prompts of each old task")
    parser.add_argument("--iters", type=int, default=BASE["iters"])
    parser.add_argument("--arms", type=int, nargs="+", default=range(len(ARMS)))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        subprocess.run([sys.executable, ROOT / "examples/fine_tune/data.py", data], check=True)
        new = (data / "train.jsonl").read_text().splitlines()
        arms = [(name, ARMS[name]) for number, name in enumerate(ARMS) if number in arguments.arms]
        for name, changed in arms:
            adapter = None
            if changed is not None:
                changes = dict(changed)
                mixed = changes.pop("mixed", None)
                lines = [*new, *(old_lines(mixed) if mixed else [])]
                random.Random(3).shuffle(lines)
                (data / "train.jsonl").write_text("\n".join(lines) + "\n")
                adapter = Path(place) / name.replace(" ", "-")
                settings = {**BASE, "iters": arguments.iters, **changes}
                prepare(Settings(**settings, data=str(data), adapter_path=str(adapter))).train(
                    lambda _: None, cancelled=lambda: False
                )
            found[name] = judged(adapter, data, arguments.n, list(TASKS))
            old = [figures["right"] for task, figures in found[name].items() if task != "double"]
            print(f"{name}: new {found[name]['double']['right']:.2f}, "
                  f"old {statistics.fmean(old):.3f}")  # fmt: skip
            for task, one in found[name].items():
                print(f"  {task:<9}{one['right']:6.3f} ± {one['error']:.3f} in "
                      f"{one['steps']:5.2f} steps", flush=True)  # fmt: skip
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
