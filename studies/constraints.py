"""Constrained replies of the demo beside plain ones: validity, judged answers, steps and time.

python studies/constraints.py --n 500 --rows rows.jsonl   # a line a reply; goes on from the file
python studies/constraints.py --host                      # host time of a step, published size
python studies/constraints.py --compile                   # compile time of real-world schemas

Tasks, with held-out prompts of the demo: "json" asks for a record (its schema), "tool" for a call
(the tool's parameters, a call forced), "choice" which letter comes first or last (one of those
named), "regex" for a list (as many words as asked for). Each prompt is answered plainly and
conditioned, by turns, with the same seed.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

KINDS: dict[str, dict[str, Any]] = {
    "name": {"type": "string"},
    "age": {"type": "integer", "minimum": 10, "maximum": 79},
    "adult": {"type": "boolean"},
    "city": {"type": "string"},
    "country": {"type": "string"},
    "pet": {"type": "string"},
    "color": {"type": "string"},
}
TASKS = {"json": "json", "tool": "tool", "choice": "think", "regex": "list"}


def asked(task: str, n: int) -> Iterator[tuple[Any, Any, Callable[[str], bool]]]:
    """Example, constraint and the validity of a raw reply."""
    from mlx_dgemma import Constraint
    from mlx_dgemma.constraints import ToolCalls
    from mlx_dgemma.demo.tasks import held_out

    examples = [e for e in held_out(TASKS[task], 4 * n) if fits(task, e)]
    for example in examples[:n]:
        prompt = example.messages[0]["content"]
        if task == "json":
            keys = list(json.loads(example.answer))
            schema = {
                "type": "object",
                "properties": {key: KINDS[key] for key in keys},
                "required": keys,
                "additionalProperties": False,
            }
            yield example, Constraint.json_schema(schema), lambda text, s=schema: valid(text, s)
        elif task == "tool":
            tools = tuple(
                (t["function"]["name"], t["function"]["parameters"]) for t in example.tools
            )
            names = "|".join(name for name, _ in tools)
            call = rf'<\|tool_call>call:({names})\{{city:<\|"\|>[^<]*<\|"\|>\}}<tool_call\|>'
            constraint = Constraint.tool_calls(ToolCalls(tools, forced=True, one=True))
            yield example, constraint, lambda text, c=call: re.fullmatch(c, text) is not None
        elif task == "choice":
            letters = list(re.search(r"[A-Z]{4,}", prompt).group())
            yield example, Constraint.choice(letters), lambda text, all_=letters: text in all_
        else:
            count = int(re.search(r"\d", prompt).group())
            pattern = rf"[a-z]+(, [a-z]+){{{count - 1}}}"
            yield (
                example,
                Constraint.regex(pattern),
                lambda text, p=pattern: re.fullmatch(p, text) is not None,
            )


def fits(task: str, example: Any) -> bool:
    if task == "tool":
        return "call:" in example.answer
    return task != "choice" or not example.enable_thinking


def measure(tasks: list[str], n: int, rows: Path | None) -> list[dict[str, Any]]:
    """Rows of task, way, number, valid, right, steps and ms; those in the file are not repeated."""
    from mlx_dgemma import load

    found = (
        [json.loads(line) for line in rows.read_text().splitlines()]
        if rows and rows.exists()
        else []
    )
    done = {(row["task"], row["way"], row["number"]) for row in found}
    model, tokenizer = load()
    passes = counted(model)
    streams = {task: enumerate(asked(task, n)) for task in tasks}
    for _ in range(n):
        for task, stream in streams.items():
            number, (example, constraint, is_valid) = next(stream)
            for way in ("plain", "conditioned"):
                if (task, way, number) in done:
                    continue
                before, started, cpu = passes(), time.perf_counter(), time.process_time()
                text = answer(
                    model, tokenizer, example, number, constraint if way == "conditioned" else None
                )
                row = {
                    "task": task, "way": way, "number": number, "valid": is_valid(text),
                    "right": example.verify(judged(task, text)), "steps": passes() - before,
                    "ms": 1000 * (time.perf_counter() - started),
                    "cpu ms": 1000 * (time.process_time() - cpu),
                }  # fmt: skip
                found.append(row)
                if rows:
                    with rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    return found


def answer(model: Any, tokenizer: Any, example: Any, seed: int, constraint: Any) -> str:
    """The raw reply, its markers included, without the stop token."""
    from mlx_dgemma import stream_generate
    from mlx_dgemma.decoding.events import Commit

    ids: list[int] = []
    for event in stream_generate(
        model, tokenizer, example.messages, tools=example.tools, seed=seed, max_tokens=96,
        constraint=constraint,
    ):  # fmt: skip
        if isinstance(event, Commit):
            ids += event.ids
    return "".join(tokenizer.token(id_) for id_ in ids).replace("\u2581", " ")


def judged(task: str, text: str) -> str:
    """The reply as the task's judge expects it: white space of JSON is free."""
    try:
        return json.dumps(json.loads(text)) if task == "json" else text
    except ValueError:
        return text


def summary(found: list[dict[str, Any]]) -> str:
    lines = [
        "| task | way | n | valid | right | steps | ms, mean | ms, median | CPU ms, median |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in TASKS:
        for way in ("plain", "conditioned"):
            part = [row for row in found if (row["task"], row["way"]) == (task, way)]
            if not part:
                continue
            mean = {
                key: float(np.mean([row[key] for row in part]))
                for key in ("valid", "right", "steps", "ms")
            }
            error = (mean["right"] * (1 - mean["right"]) / len(part)) ** 0.5
            middle = [float(np.median([row[key] for row in part])) for key in ("ms", "cpu ms")]
            lines.append(
                f"| {task} | {way} | {len(part)} | {mean['valid']:.3f} "
                f"| {mean['right']:.3f} ± {error:.3f} | {mean['steps']:.1f} | {mean['ms']:.0f} "
                f"| {middle[0]:.0f} | {middle[1]:.0f} |"
            )
    return "\n".join(lines)


def counted(model: Any) -> Callable[[], int]:
    """Counts decoder passes, whatever asks for them."""
    count, original = [0], type(model).hidden

    def hidden(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return original(self, *arguments, **options)

    type(model).hidden = hidden
    return lambda: count[0]


def valid(text: str, schema: Any) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rows", type=Path, help="file of finished replies, a line each")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.host:
        from constraints_cost import host

        print(json.dumps(host()))
        return
    if arguments.compile:
        from constraints_cost import compilation

        print(json.dumps(compilation()))
        return
    print(summary(measure(arguments.tasks, arguments.n, arguments.rows)))


if __name__ == "__main__":
    main()
