"""Hostile requests, as many as wanted, each answer held to the bounds of `tests/server/bounds.py`.

    python studies/hostile_requests.py --mutator havoc --requests 20000 --seed 1 --runs 5

The server's application runs in this process over a model with a fixed reply: what is tried is
everything before and behind the model. `structure` damages sound requests by what their fields
mean, `havoc` recorded requests of real clients by AFL's mutations. Prints one line of JSON a run,
with every problem, and fails if there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from server import bounds, havoc, hostile

MUTATORS = {"structure": hostile.requests, "havoc": havoc.requests}


def measure(mutator: str, seed: int, count: int) -> dict[str, object]:
    started = time.process_time()
    with bounds.scripted_app() as app:
        seen = asyncio.run(bounds.run(app, islice(MUTATORS[mutator](seed), count)))
    return {
        "mutator": mutator,
        "seed": seed,
        "requests": seen.statuses.total(),
        "statuses": dict(sorted(seen.statuses.items())),
        "slowest_seconds": round(seen.slowest, 2),
        "loop_blocked_seconds": round(seen.blocked, 3),
        "memory_mb": seen.memory >> 20,
        "processor_seconds": round(time.process_time() - started, 1),
        "problems": seen.broken(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutator", choices=MUTATORS, default="structure")
    parser.add_argument("--requests", type=int, default=20_000, help="of a run")
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    failed = False
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        found = measure(arguments.mutator, seed, arguments.requests)
        print(json.dumps(found), flush=True)
        failed = failed or bool(found["problems"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
