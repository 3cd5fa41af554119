"""What few-steps training is worth: the demo model before and after, on held-out prompts.

    python studies/few_steps.py train ADAPTER                    # on prompts, judged by their tasks
    python studies/few_steps.py measure ADAPTER --entropy-bound 3 --preset balanced
    python studies/few_steps.py measure                          # the untouched demo

For every task: the share of right answers with its standard error, denoising steps a block, and for
those with many right answers diversity: the share of distinct answers among several to one prompt.
`--validation` asks prompts of the kind that is trained on, to choose settings by.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dgemma import load
from mlx_dgemma.benchmark.quality import MAX_TOKENS, ask, figures
from mlx_dgemma.demo.tasks import TASKS, Example
from mlx_dgemma.prompt import ReplyReader, Tokenizer
from mlx_dgemma.training.data import Example as Prompt
from mlx_dgemma.training.run import prepare
from mlx_dgemma.training.settings import Settings

OPEN = [name for name, task in TASKS.items() if task.open_ended]
PROMPTS, OTHERS = 100, 10  # of an open-ended task, of any other
TRAINING: dict[str, Any] = {
    "train": True, "objective": "few-steps", "batch_size": 12, "iters": 600, "rank": 16,
    "learning_rate": 2e-3, "rounds": 5, "detach_context": True, "entropy_bound": 2.0,
    "val_replies": 0, "steps_per_report": 50,
}  # fmt: skip


def train(folder: Path, changes: dict[str, Any], seconds: float) -> None:
    """Trains an adapter on answers that the tasks judge right, or goes on with it."""
    generator = random.Random(5)
    examples = [
        task.sample(generator)
        for task in TASKS.values()
        for _ in range(PROMPTS if task.open_ended else OTHERS)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"messages": e.messages} | ({"tools": e.tools} if e.tools else {}) for e in examples]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    resume = any(folder.glob("*.safetensors"))
    settings = {**TRAINING, "data": str(folder), "adapter_path": str(folder), "resume": resume}
    prepared = prepare(Settings(**{**settings, **changes}))
    by_prompt = {
        prompt.prompt.tobytes(): example
        for prompt, example in zip(prepared.splits["train"], examples, strict=True)
    }
    tokenizer = prepared.tokenizer

    def judge(prompt: Prompt, ids: np.ndarray) -> bool:
        return is_right(by_prompt[prompt.prompt.tobytes()], ids.tolist(), tokenizer)

    done = prepared.train(
        lambda event: print(event, flush=True),
        cancelled=lambda: time.process_time() > seconds,
        judge=judge,
    )
    print("trained" if done else "not done: run it again")


def is_right(example: Example, ids: list[int], tokenizer: Tokenizer) -> bool:
    end = next((place for place, id_ in enumerate(ids) if id_ in tokenizer.stop_ids), len(ids))
    if example.tools:
        return example.verify(tokenizer.decode(ids[:end]))
    reader = ReplyReader(tokenizer)
    parts = [reader.feed(ids[:end]), reader.finish()]
    return example.verify("".join(part.text for part in parts))


def prompts_of(task: str, count: int, seed: int, validation: bool) -> list[Example]:
    if not validation:
        return TASKS[task].held_out(count, seed)
    generator = random.Random(seed)
    return [TASKS[task].sample(generator) for _ in range(count)]


def measured(
    adapter: str | None, tasks: list[str], arguments: argparse.Namespace, options: dict[str, Any]
) -> dict[str, Any]:
    model, tokenizer = load(adapter_path=adapter)
    found: dict[str, Any] = {}
    for task in tasks:
        examples = prompts_of(task, arguments.n, arguments.seed, arguments.validation)

        def answered(example: Example, seed: int) -> Any:
            return ask(model, tokenizer, example, seed=seed, max_tokens=MAX_TOKENS, **options)

        found[task] = figures([answered(e, seed) for seed, e in enumerate(examples)])
        line = (
            f"  {task:<9}{found[task]['right']:6.3f} ± {found[task]['error']:.3f} right in "
            f"{found[task]['steps']:5.2f} steps a block"
        )
        if task in OPEN and arguments.draws:
            shares = [
                len({answered(e, seed).text for seed in range(arguments.draws)}) / arguments.draws
                for e in examples[: arguments.prompts]
            ]
            found[task]["distinct"] = statistics.fmean(shares)
            line += f", {found[task]['distinct']:.2f} of {arguments.draws} answers distinct"
        print(line, flush=True)
    of = [found[task] for task in OPEN if task in found]
    if of:
        error = sum(one["error"] ** 2 for one in of) ** 0.5 / len(of)
        right, steps = (statistics.fmean(one[name] for one in of) for name in ("right", "steps"))
        print(f"  open-ended: {right:.3f} ± {error:.3f} right in {steps:.2f} steps a block")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True)
    learn = actions.add_parser("train")
    learn.add_argument("folder", type=Path)
    learn.add_argument("--seconds", type=float, default=float("inf"), help="of the processor")
    learn.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="settings")
    compare = actions.add_parser("measure")
    compare.add_argument("adapter", nargs="?")
    compare.add_argument("--n", type=int, default=60, help="prompts a task")
    compare.add_argument("--draws", type=int, default=8, help="answers to one prompt")
    compare.add_argument("--prompts", type=int, default=8, help="that are answered so often")
    compare.add_argument("--tasks", nargs="+", default=list(TASKS))
    compare.add_argument("--seed", type=int, default=4711)
    compare.add_argument("--validation", action="store_true")
    compare.add_argument("--entropy-bound", type=float)
    compare.add_argument("--preset", default="reference")
    compare.add_argument("--commit-entropy", type=float)
    compare.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if "folder" in arguments:
        changes = (entry.split("=", 1) for entry in arguments.set)
        train(
            arguments.folder,
            {name: json.loads(value) for name, value in changes},
            arguments.seconds,
        )
        return
    names = ("entropy_bound", "preset", "commit_entropy")
    options = {name: getattr(arguments, name) for name in names}
    print(arguments.adapter or "the demo", options)
    found = measured(arguments.adapter, arguments.tasks, arguments, options)
    if arguments.json:
        arguments.json.write_text(json.dumps({"options": options, "tasks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
