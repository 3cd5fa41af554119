"""What few-steps training is worth: the demo model before and after, on held-out prompts.

    python studies/few_steps.py prompts DATA            # prompts without answers, for training
    python studies/few_steps.py measure ADAPTER [...]   # the untouched demo and each adapter

For every open-ended task: the share of right answers with its standard error, denoising steps a
block, and diversity: the share of distinct answers among several to one prompt. The other tasks
are there to show what is forgotten.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from mlx_dgemma import load
from mlx_dgemma.benchmark.quality import MAX_TOKENS, SEED, measure
from mlx_dgemma.decoding.events import Finish
from mlx_dgemma.demo.tasks import TASKS, held_out
from mlx_dgemma.generate import stream_generate

OPEN = [name for name, task in TASKS.items() if task.open_ended]
PROMPTS = 220  # of an open-ended task; a tenth of it of the others


def write_prompts(folder: Path) -> None:
    rng = random.Random(5)
    lines = []
    for task in TASKS.values():
        for _ in range(PROMPTS if task.open_ended else PROMPTS // 10):
            example = task.sample(rng)
            line: dict[str, Any] = {"messages": example.messages}
            if example.tools:
                line["tools"] = example.tools
            lines.append(json.dumps(line))
    rng.shuffle(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def distinct(model: Any, tokenizer: Any, task: str, prompts: int, draws: int) -> float:
    """Share of distinct replies among `draws` to one prompt, the mean over prompts."""
    shares = []
    for example in held_out(task, prompts, seed=SEED):
        replies = set()
        for seed in range(draws):
            events = stream_generate(
                model, tokenizer, example.messages, seed=seed, max_tokens=MAX_TOKENS
            )
            replies.add("".join(e.text for e in events if not isinstance(e, Finish)))
        shares.append(len(replies) / draws)
    return statistics.fmean(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True)
    write = actions.add_parser("prompts")
    write.add_argument("folder", type=Path)
    compare = actions.add_parser("measure")
    compare.add_argument("adapters", nargs="*")
    compare.add_argument("--n", type=int, default=60, help="prompts a task")
    compare.add_argument("--draws", type=int, default=8, help="answers to one prompt")
    compare.add_argument("--all", action="store_true", help="the tasks with one answer as well")
    compare.add_argument("--no-base", action="store_true")
    compare.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if "folder" in arguments:
        write_prompts(arguments.folder)
        return
    tasks = list(TASKS) if arguments.all else OPEN
    found: dict[str, Any] = {}
    for adapter in [*([] if arguments.no_base else [None]), *arguments.adapters]:
        model, tokenizer = load(adapter_path=adapter)
        name = adapter or "the demo"
        found[name] = measure(model, tokenizer, prompts=arguments.n, tasks=tasks)
        print(name)
        for task, figures in found[name].items():
            line = (
                f"  {task:<9}{figures['right']:6.3f} ± {figures['error']:.3f} right in "
                f"{figures['steps']:5.2f} steps a block"
            )
            if task in OPEN and arguments.draws:
                share = distinct(model, tokenizer, task, 5, arguments.draws)
                figures["distinct"] = share
                line += f", {share:.2f} of {arguments.draws} answers distinct"
            print(line, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
