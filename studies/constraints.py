"""Constrained replies on the demo, through the server: validity, judged answers, steps and time.

python studies/constraints.py --n 500           # the tasks "json" and "tool", held-out prompts
python studies/constraints.py --host            # host time of a step at the published size
python studies/constraints.py --compile         # compile time of real-world schemas
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
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


def requests(task: str, n: int) -> Iterator[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Example, request body and the schema its reply or arguments must satisfy."""
    from mlx_dgemma.demo.tasks import TASKS

    examples = [e for e in TASKS[task].held_out(3 * n, 0) if task != "tool" or "call:" in e.answer]
    for seed, example in enumerate(examples[:n]):
        body: dict[str, Any] = {"messages": example.messages, "seed": seed, "max_tokens": 96}
        if task == "tool":
            tools = example.tools
            schema = tools[0]["function"]["parameters"]
            body |= {"tools": tools, "tool_choice": "required"}
        else:
            keys = list(json.loads(example.answer))
            schema = {
                "type": "object",
                "properties": {key: KINDS[key] for key in keys},
                "required": keys,
                "additionalProperties": False,
            }
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "record", "schema": schema, "strict": True},
            }
        yield example, body, schema


def measure(task: str, n: int) -> dict[str, Any]:
    from starlette.testclient import TestClient

    from mlx_dgemma import Runtime
    from mlx_dgemma.server.app import create_app
    from mlx_dgemma.server.settings import ServerSettings

    rows = []
    runtime = Runtime()
    app = create_app(runtime, ServerSettings())
    with TestClient(app, base_url="http://127.0.0.1") as client:
        finished = runtime_steps(runtime)
        for example, body, schema in requests(task, n):
            before, started = finished(), time.perf_counter()
            reply = client.post("/v1/chat/completions", json=body).json()
            seconds = time.perf_counter() - started
            steps = finished() - before
            if "choices" not in reply:
                raise SystemExit(f"seed {body['seed']} of {task}: {reply}")
            message = reply["choices"][0]["message"]
            if task == "tool":
                calls = message.get("tool_calls") or []
                text = calls[0]["function"]["arguments"] if calls else ""
                name = calls[0]["function"]["name"] if calls else ""
                made = json.loads(text) if text else {}
                city = made.get("city") if isinstance(made, dict) else None
                call = f'<|tool_call>call:{name}{{city:<|"|>{city}<|"|>}}<tool_call|>'
                right = example.verify(call)
            else:
                text = message["content"] or ""
                right = example.verify(json.dumps(json.loads(text)) if valid(text, True) else text)
            rows.append((valid(text, schema), right, steps, 1000 * seconds))
    table = np.array(rows, dtype=float)
    means = table.mean(axis=0)
    return {
        "task": task, "n": len(rows), "valid": round(means[0], 3), "right": round(means[1], 3),
        "steps": round(means[2], 2), "ms": round(means[3], 1),
        "ms median": round(float(np.median(table[:, 3])), 1),
    }  # fmt: skip


def runtime_steps(runtime: Any) -> Any:
    """Counts decoder passes, whatever asks for them."""
    count = [0]
    original = type(runtime.model).hidden

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return original(self, *arguments, **options)

    type(runtime.model).hidden = counted
    return lambda: count[0]


def valid(text: str, schema: Any) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=["json", "tool"])
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
    for task in arguments.tasks:
        print(json.dumps(measure(task, arguments.n)), flush=True)


if __name__ == "__main__":
    main()
