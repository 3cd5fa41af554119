"""Random kills of `mlx_dgemma.lora`: what is lost, and is the adapter still that of a whole run?

    python studies/training_kills.py --kills 100 --seed 1

A run with one adapted layer of the demo model is killed with signal 9 at a random moment, while it
starts, reads, takes a step or saves, and is gone on with until it has been killed `--chain` times
and then ends by itself. After every kill the last save must be whole and at most one save interval
old; at the end the adapter must equal that of a run that nobody touched, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.headers import read_header

ROOT = Path(__file__).parents[1]
INTERVAL, STEPS = 3, 36
WORDS = ("AB", "CD", "EF", "GH", "IJ", "KL", "MN", "OP")
FLAGS = (
    "--train --batch-size 2 --num-layers 1 --rank 1 --encoder-weight 0 --val-replies 0 "
    f"--steps-per-report 1 --save-every {INTERVAL} --iters {STEPS}"
).split()


@dataclass(frozen=True)
class Kill:
    """One of them. lines: what the process had printed; reported, saved: steps. problem: None where
    all was as it should be."""

    objective: str
    lines: int
    reported: int
    saved: int
    problem: str | None


def command(folder: Path, adapter: Path, objective: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "mlx_dgemma", "lora", *FLAGS, "--objective", objective,
        "--data", str(folder), "--adapter-path", str(adapter), *more,
    ]  # fmt: skip


def run_killed(
    generator: random.Random, folder: Path, adapter: Path, objective: str, startup: float
) -> Kill | None:
    """Starts or goes on, kills after some printed lines and a moment; None if it ended first."""
    kept = any(adapter.glob("*.safetensors"))
    saved_before = saved_step(adapter)
    process = subprocess.Popen(
        command(folder, adapter, objective, *(["--resume"] if kept else [])),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    wanted = generator.choice((0, generator.randrange(1, 3 * INTERVAL)))
    lines: list[str] = []
    while len(lines) < wanted and (line := process.stdout.readline()):
        lines.append(line)
    time.sleep(generator.uniform(0, 0.2 if wanted else startup))
    process.send_signal(signal.SIGKILL)
    rest, said = process.communicate()
    if process.returncode == 0:
        return None
    lines += rest.splitlines()
    steps = [int(step) for line in lines for step in re.findall(r"^step (\d+): loss", line)]
    reported, saved = max([*steps, saved_before]), saved_step(adapter)
    problem = None
    if process.returncode != -signal.SIGKILL:
        problem = f"it ended with {process.returncode}: {said.strip()[-300:]}"
    elif reported - saved > INTERVAL or saved < saved_before:
        problem = "more than one save interval is lost"
    return Kill(objective, len(lines), reported, saved, problem)


def saved_step(adapter: Path) -> int:
    """The step of the last save, 0 if there is none; raises where a file is not whole."""
    steps = {}
    for name in ("training_state.safetensors", "adapters.safetensors"):
        if (adapter / name).exists():
            tensors(adapter / name)
            steps[name] = int(read_header(adapter / name).metadata["step"])
    state = steps.get("training_state.safetensors", 0)
    assert steps.get("adapters.safetensors", state) in (state, state - INTERVAL)
    return state


def tensors(file: Path) -> dict[str, np.ndarray]:
    found: Any = mx.load(str(file))
    return {name: np.array(tensor) for name, tensor in found.items()}


def same(one: Path, other: Path) -> bool:
    found, expected = (tensors(folder / "adapters.safetensors") for folder in (one, other))
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--chain", type=int, default=10, help="kills of one run")
    parser.add_argument("--objectives", nargs="+", default=("diffusion", "few-steps"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines, one for each kill, as they come")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    kills: list[Kill] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lines = [
            {"messages": [{"role": "user", "content": f"Double the letters {word}"},
                          {"role": "assistant", "content": "".join(2 * c for c in word)}]}
            for word in WORDS
        ]  # fmt: skip
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
        whole, startup = {}, {}
        number = 0
        while len(kills) < arguments.kills:
            objective = arguments.objectives[number % len(arguments.objectives)]
            if objective not in whole:
                whole[objective], started = folder / f"whole-{objective}", time.monotonic()
                subprocess.run(
                    command(folder, whole[objective], objective), check=True, capture_output=True
                )
                startup[objective] = (time.monotonic() - started) / 2
            adapter, killed = folder / f"killed-{number}", 0
            while killed < min(arguments.chain, arguments.kills - len(kills) + killed):
                kill = run_killed(generator, folder, adapter, objective, startup[objective])
                if kill is None:
                    break
                kills.append(kill)
                killed += 1
                if arguments.out is not None:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(asdict(kill)) + "\n")
            more = ["--resume"] if any(adapter.glob("*.safetensors")) else []
            subprocess.run(
                command(folder, adapter, objective, *more), check=True, capture_output=True
            )
            if not same(adapter, whole[objective]):
                problems.append(f"the adapter of {objective}, run {number}, is another one")
            number += 1
    problems += [f"{kill}" for kill in kills if kill.problem is not None]
    lost = Counter(kill.reported - kill.saved for kill in kills)
    print(f"{len(kills)} kills of {number} runs; steps lost: {dict(sorted(lost.items()))}")
    print(f"{len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
