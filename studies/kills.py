"""Random kills of one of the processes that hold a model: does the rest end, and how soon?

    python -m studies.kills --kills 200 --seed 1

Each time 2 to 4 processes on the loopback hold the demo model, one rank is killed or stopped at a
random moment while it starts, loads, reads a prompt, denoises or waits, and every process must be
gone within 15 seconds, with one sentence of rank 0 that names the rank where rank 0 was not the
one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 15.0
PHASES = ("starting", "loading", "idle", "prefill", "denoising")


@dataclass(frozen=True)
class Outcome:
    """One kill. seconds: from it until the last process was gone. load: of the machine over the
    minute before, which may be what made it slow. problem: None where all was as it should be."""

    size: int
    phase: str
    rank: int
    stopped: bool
    seconds: float
    load: float
    problem: str | None


def kill_once(generator: random.Random, folder: Path) -> Outcome:
    from tests.distributed.processes import finish, said, start

    size = generator.choice((2, 2, 2, 4))
    phase, rank = generator.choice(PHASES), generator.randrange(size)
    stop = rank > 0 and phase not in PHASES[:2] and generator.random() < 0.2
    program = str(ROOT / "tests" / "distributed" / "working.py")
    worked = "denoising" if phase in PHASES[:2] else phase
    processes = start([sys.executable, program, worked], size, folder)
    # Rank 0 says "joined" when MLX has connected it, and "ready" when the model is loaded.
    _read_lines(processes[0], {"starting": 0, "loading": 1}.get(phase, 2))
    time.sleep(generator.uniform(0.0, 4.0 if phase == "starting" else 1.0))
    processes[rank].send_signal(signal.SIGSTOP if stop else signal.SIGKILL)
    started = time.monotonic()
    problem = None
    try:
        spoken = finish(processes, timeout=40)
    except subprocess.TimeoutExpired:
        took = time.monotonic() - started
        return Outcome(size, phase, rank, stop, took, os.getloadavg()[0], "it hangs")
    took = time.monotonic() - started
    lines = said(spoken[0][1])
    if took > LIMIT:
        problem = "too late"
    elif rank > 0 and (len(lines) != 1 or f"Rank {rank} " not in lines[0]):
        problem = f"rank 0 said {lines}"
    # Where MLX holds the interpreter, the program beside it ends rank 0 by a signal.
    elif rank > 0 and processes[0].returncode not in ((2, -9) if phase in PHASES[:2] else (2,)):
        problem = f"rank 0 ended with {processes[0].returncode}"
    return Outcome(size, phase, rank, stop, took, os.getloadavg()[0], problem)


def _read_lines(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    for _ in range(count):
        process.stdout.readline()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines, one for each kill, as they come")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.kills):
            found.append(kill_once(generator, Path(folder)))
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(asdict(found[-1])) + "\n")
    slowest = max(one.seconds for one in found)
    problems = [one for one in found if one.problem is not None]
    print(f"{len(found)} kills, {len(problems)} problems, the slowest end after {slowest:.1f} s")
    for one in problems:
        print(one)
    return 1 if problems else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
