"""Conversions killed at random moments: does the next one recover, with the same bytes?

    python studies/conversion_kills.py --kills 1000 --seed 1

`mlx_dgemma.convert` of the demo checkpoint, killed with SIGKILL at a random moment of its run,
again and again until one is left to end; every other time it replaces a checkpoint. After a kill
the target is missing or whole, old or new. In the end every file equals that of a conversion that
was never killed, and nothing lies beside it. Each is a fork of a process that has imported
everything: its moments are those of the work, not of the imports. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_dgemma.__main__ import main as command
from mlx_dgemma.demo import CHECKPOINT

SHARD_BYTES = 400_000  # a dozen shards of the demo
MOST_IN_A_ROW = 6  # kills before a conversion is left to end
RECIPES = ("4bit", "8bit")  # of what is replaced, and of what replaces it


@dataclass
class Found:
    """kills: by what lay at the target and beside it then. finished: conversions that ended.
    too_late: of them those that were to be killed. problems: what should not be."""

    kills: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    too_late: int = 0
    problems: list[str] = field(default_factory=list)


def start(target: Path, recipe: str) -> int:
    """The process id of a conversion that has just begun."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        code = convert(target, recipe)
    finally:
        os._exit(code)


def convert(target: Path, recipe: str) -> int:
    from mlx_dgemma.convert import conversion

    conversion.convert.__kwdefaults__["shard_bytes"] = SHARD_BYTES
    return command(
        ["convert", "--hf-path", str(CHECKPOINT), "--mlx-path", str(target), "--recipe", recipe,
         "--overwrite"]
    )  # fmt: skip


def ended(child: int) -> int:
    """Its exit code; -9 for a kill."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """Of every file."""
    files = sorted(folder.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def measure(kills: int, seed: int) -> dict[str, Any]:
    rng, found = random.Random(seed), Found()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        whole, takes = {}, 0.0
        for recipe in RECIPES:
            began = time.monotonic()
            assert ended(start(folder / recipe, recipe)) == 0
            takes = time.monotonic() - began
            whole[recipe] = digests(folder / recipe)
        while found.kills.total() < kills:
            replaced = found.finished % 2 == 1
            target = folder / "work" / "out"
            target.parent.mkdir()
            if replaced:
                shutil.copytree(folder / RECIPES[0], target)
            _one(rng, found, target, whole, takes, replaced)
            shutil.rmtree(target.parent)
    return {
        "seed": seed,
        "kills": found.kills.total(),
        "killed_when": dict(sorted(found.kills.items())),
        "conversions_that_ended": found.finished,
        "of_them_before_their_kill": found.too_late,
        "seconds_of_one": round(takes, 2),
        "problems": found.problems[:20],
    }


def _one(
    rng: random.Random,
    found: Found,
    target: Path,
    whole: dict[str, dict[str, str]],
    takes: float,
    replaced: bool,
) -> None:
    """Conversions to one target until one ends, killed at most MOST_IN_A_ROW times before."""
    for left in reversed(range(rng.randint(1, MOST_IN_A_ROW) + 1)):
        child = start(target, RECIPES[1])
        if left:
            time.sleep(rng.uniform(0, takes))
            os.kill(child, signal.SIGKILL)
        code = ended(child)
        if code == -signal.SIGKILL:
            found.kills[_state(target)] += 1
            allowed = [whole[RECIPES[1]], *([whole[RECIPES[0]]] if replaced else [])]
            there = digests(target) if target.exists() else None
            if there not in [*allowed, None]:
                found.problems.append(f"half a checkpoint: {sorted(there or ())}")
            continue
        found.finished += 1
        found.too_late += left > 0
        if code != 0:
            found.problems.append(f"exit code {code}")
        elif digests(target) != whole[RECIPES[1]]:
            found.problems.append("other bytes")
        beside = sorted(path.name for path in target.parent.iterdir())
        if beside != [target.name]:
            found.problems.append(f"left beside the target: {beside}")
        return


def _state(target: Path) -> str:
    """What a kill left, by the names of the folders."""
    names = sorted(path.name.split("-")[0] for path in target.parent.iterdir())
    journal = target.with_name("out.partial") / "conversion.json"
    with_shards = journal.exists() and bool(json.loads(journal.read_text())["shards"])
    return " + ".join(names) + (" with shards" if with_shards else "") or "nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    result = measure(arguments.kills, arguments.seed)
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
