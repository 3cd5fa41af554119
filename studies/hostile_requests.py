"""Hostile requests, as many as wanted, each answer held to the bounds of `tests/server/bounds.py`.

    python studies/hostile_requests.py --mutator havoc --requests 20000 --seed 1 --runs 5

The server's application runs in this process over a model with a fixed reply: what is tried is
everything around the model. `structure` damages sound requests by what their fields
mean, `havoc` recorded requests of real clients by AFL's mutations; `schemas`, `pictures` and
`large` ask for much. Prints one line of JSON a run, with every problem and every long pause of the
event loop: what was asked, and how long the same takes alone, in new processes. It fails if there
is a problem.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from server import bombs, bounds, havoc, hostile

MUTATORS = {
    "structure": hostile.requests,
    "havoc": havoc.requests,
    "schemas": bombs.schema_requests,
    "pictures": bombs.picture_requests,
    "large": bombs.large_requests,
}
NOTED = 0.15  # seconds of a pause of the event loop, after which its requests are sent again, alone


def measure(mutator: str, seed: int, count: int) -> dict[str, object]:
    started = time.process_time()
    requests = islice(MUTATORS[mutator](seed), count)
    seen = bounds.check(bounds.scripted_app, requests, noted=NOTED)
    return {
        "mutator": mutator,
        "seed": seed,
        "requests": seen.statuses.total(),
        "statuses": dict(sorted(seen.statuses.items())),
        "slowest_seconds": round(seen.slowest, 2),
        "loop_blocked_seconds": round(seen.blocked, 3),
        "memory_mb": seen.memory >> 20,
        "processor_seconds": round(time.process_time() - started, 1),
        "pauses": [asdict(pause) for pause in seen.pauses],
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
        print(json.dumps(found, default=repr), flush=True)
        failed = failed or bool(found["problems"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
