"""Damaged files of every kind through load, convert, verify, inspect, caches and traces.

    python studies/damaged_files.py --cases 25000 --seed 0 --mutator structure

Each case must end in success or in one sentence (a DGemmaError), within SECONDS of computing and
MEGABYTES of memory. Cases run in a process of their own that the study restarts when it dies or
hangs. `structure` knows what the files mean (damage.py), `havoc` does not (havoc.py),
`special` puts a pipe, a folder, a socket or a device in a file's place. Prints counts
per kind, and everything that broke a bound with the number that repeats it (`--only NUMBER`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from damage import Damage, damage_file, replace_by_special
from havoc import Havoc
from whole_files import build

SECONDS = 10  # of the processor
WALL_SECONDS = 120  # then it hangs, whatever else the machine does
MEGABYTES = 256
LONGEST_SENTENCE = 2000

# Kind -> (the file that is damaged, what may be done with it)
FOLDER_ACTIONS = ("load", "verify", "inspect", "convert")
KINDS = {
    "config": ("model/config.json", FOLDER_ACTIONS),
    "generation config": ("model/generation_config.json", ("load", "verify")),
    "processor config": ("model/processor_config.json", ("load", "images")),
    "index": ("model/model.safetensors.index.json", FOLDER_ACTIONS),
    "tokenizer": ("model/tokenizer.json", ("tokenizer", "verify")),
    "tokenizer config": ("model/tokenizer_config.json", ("tokenizer", "verify")),
    "chat template": ("model/chat_template.jinja", ("tokenizer",)),
    "weights": ("model/model-00001-of-00002.safetensors", FOLDER_ACTIONS),
    "packed weights": ("packed/model.safetensors", FOLDER_ACTIONS),
    "packed config": ("packed/config.json", FOLDER_ACTIONS),
    "journal": ("packed/conversion.json", ("verify",)),
    "adapter config": ("adapter/adapter_config.json", ("adapter", "convert adapter")),
    "adapter weights": ("adapter/adapter_model.safetensors", ("adapter", "convert adapter")),
    "mlx-lm adapter config": ("mlx/adapter_config.json", ("mlx adapter",)),
    "mlx-lm adapter weights": ("mlx/adapters.safetensors", ("mlx adapter",)),
    "prompt cache": ("cache.safetensors", ("prompt cache",)),
    "trace": ("trace.json", ("trace",)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutator", choices=("structure", "havoc", "special"), default="structure")
    parser.add_argument("--only", type=int, help="run this one case and show what it raised")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return _work(Path(arguments.worker), arguments.mutator)
    numbers = [arguments.only] if arguments.only is not None else range(arguments.cases)
    found = run(numbers, arguments.seed, arguments.mutator, progress=True)
    print(found.table())
    for fault in found.faults[:50]:
        print(f"\ncase {fault['case']} ({fault['kind']}, {fault['action']}): {fault['outcome']}")
        print(fault["detail"])
    return 1 if found.faults else 0


@dataclass
class Found:
    """Counts of (kind, outcome), and every case that broke a bound."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0
    most_memory: float = 0.0

    def add(self, case: dict[str, Any]) -> None:
        self.counts[case["kind"], case["outcome"]] += 1
        self.slowest = max(self.slowest, case.get("seconds", 0.0))
        self.most_memory = max(self.most_memory, case.get("megabytes", 0.0))
        if case["outcome"] not in ("success", "sentence"):
            self.faults.append(case)

    def table(self) -> str:
        outcomes = sorted({outcome for _, outcome in self.counts})
        lines = [f"| kind | {' | '.join(outcomes)} |", "|" + " --- |" * (len(outcomes) + 1)]
        for kind in KINDS:
            row = [f"{self.counts[kind, outcome]:,}" for outcome in outcomes]
            lines.append(f"| {kind} | {' | '.join(row)} |")
        lines.append(
            f"\n{self.counts.total():,} cases, {len(self.faults)} faults; slowest "
            f"{self.slowest:.1f} s of the processor, most memory {self.most_memory:.0f} MB."
        )
        return "\n".join(lines)


def run(numbers: Any, seed: int, mutator: str = "structure", progress: bool = False) -> Found:
    """Runs the cases of these numbers, one after the other, in a process that may die."""
    found = Found()
    with tempfile.TemporaryDirectory() as scratch:
        worker = _Worker(Path(scratch), mutator)
        try:
            for done, number in enumerate(numbers, 1):
                found.add(worker.run(number, seed))
                if progress and done % 500 == 0:
                    print(f"{done:,} cases, {len(found.faults)} faults", file=sys.stderr)
        finally:
            worker.stop()
    return found


class _Worker:
    """The process that runs cases; a new one takes the place of one that died."""

    def __init__(self, scratch: Path, mutator: str) -> None:
        self._scratch = scratch
        self._mutator = mutator
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(self._scratch), "--mutator", self._mutator],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._lines = queue.Queue()
        threading.Thread(target=self._listen, args=(process, self._lines), daemon=True).start()
        ready = self._lines.get(timeout=300)
        assert ready == "ready\n", ready
        return process

    @staticmethod
    def _listen(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def run(self, number: int, seed: int) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        process.stdin.write(f"{number} {seed}\n")
        process.stdin.flush()
        kind, action, _ = plan_case(number, seed)
        about = {"case": number, "kind": kind, "action": action, "detail": ""}
        try:
            line = self._lines.get(timeout=WALL_SECONDS)
        except queue.Empty:
            self.stop()
            return {**about, "outcome": "hang"}
        if line is None:
            code = process.wait()
            self._process = None
            return {**about, "outcome": "death", "detail": f"exit code {code}"}
        return {**about, **json.loads(line)}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def plan_case(number: int, seed: int) -> tuple[str, str, random.Random]:
    """(kind, action, the case's random numbers)."""
    chance = random.Random(f"{seed}/{number}")
    kind = list(KINDS)[number % len(KINDS)]
    return kind, chance.choice(KINDS[kind][1]), chance


# The worker


def _work(scratch: Path, mutator: str) -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    whole = scratch / "whole"
    if not (whole / "trace.json").exists():
        build(whole)
    models = _Models(whole)
    for kind, (name, actions) in KINDS.items():  # damage is all that may be wrong
        for action in actions:
            if action.startswith("convert"):
                continue  # would write into the whole files
            try:
                _act(action, whole, models, (whole / name).parent)
            except Exception as error:
                print(f"{action} of whole {kind}: {error}", file=answers, flush=True)
    print("ready", file=answers, flush=True)
    damage = damage_file
    if mutator == "havoc":
        texts = [whole / name for name, _ in KINDS.values() if not name.endswith(".safetensors")]
        havoc = Havoc(path.read_bytes() for path in texts)
        damage = havoc.file
    elif mutator == "special":
        damage = replace_by_special
    for line in sys.stdin:
        number, seed = map(int, line.split())
        print(json.dumps(_case(scratch, models, damage, number, seed)), file=answers, flush=True)
    return 0


def _case(scratch: Path, models: _Models, damage: Damage, number: int, seed: int) -> dict[str, Any]:
    kind, action, chance = plan_case(number, seed)
    folder = scratch / f"case-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(models.whole, folder, copy_function=os.link)
    damage(folder / KINDS[kind][0], chance)
    _reset_peak()
    before, began = _memory("VmRSS"), time.process_time()
    outcome, detail = "success", ""
    try:
        _act(action, folder, models, (folder / KINDS[kind][0]).parent)
    except Exception as error:
        outcome, detail = judge(error)
    except BaseException as error:  # a panic of a Rust library is no Exception
        outcome, detail = "traceback", repr(error)[:2000]
    seconds, megabytes = time.process_time() - began, _memory("VmHWM") - before
    if seconds > SECONDS:
        outcome, detail = "slow", f"{seconds:.1f} s: {detail}"
    if megabytes > MEGABYTES:
        outcome, detail = "memory", f"{megabytes:.0f} MB: {detail}"
    return {"outcome": outcome, "detail": detail, "seconds": seconds, "megabytes": megabytes}


def judge(error: Exception) -> tuple[str, str]:
    """Whether an error is one sentence for the user."""
    from mlx_dgemma.errors import DGemmaError

    text = str(error)
    if not isinstance(error, DGemmaError):
        return "traceback", "".join(traceback.format_exception(error))[-3000:]
    if not text.isprintable() or not text.endswith(".") or len(text) > LONGEST_SENTENCE:
        return "no sentence", repr(text)[:LONGEST_SENTENCE]
    return "sentence", text


def _act(action: str, folder: Path, models: _Models, model: Path) -> None:
    from mlx_dgemma.checkpoint.weights import load_model
    from mlx_dgemma.convert import convert
    from mlx_dgemma.convert.inspection import inspect
    from mlx_dgemma.convert.verify import verify
    from mlx_dgemma.errors import CheckpointError
    from mlx_dgemma.model.config import ModelConfig
    from mlx_dgemma.prompt.patches import ImageProcessor
    from mlx_dgemma.prompt.tokenizer import load_tokenizer

    if action == "load":
        load_model(model)
    elif action == "verify":
        for problem in verify(model).problems:
            raise CheckpointError(problem)
    elif action == "inspect":
        inspect(model)
    elif action == "convert":
        convert(model, folder / "out", recipe="4bit")
    elif action == "images":
        ImageProcessor.from_config(ModelConfig.from_folder(model))
    elif action == "tokenizer":
        tokenizer = load_tokenizer(model, [1])
        tokenizer.decode(tokenizer.encode("Some words, 12 of them.", special=True))
    elif action == "adapter":
        load_model(models.whole / "model", adapter_path=folder / "adapter")
    elif action == "mlx adapter":
        load_model(models.whole / "model", adapter_path=folder / "mlx")
    elif action == "convert adapter":
        convert(models.whole / "model", folder / "out", adapter_path=folder / "adapter")
    elif action == "prompt cache":
        _use_cache(folder / "cache.safetensors", models)
    else:
        _replay(folder / "trace.json", models)


def _use_cache(path: Path, models: _Models) -> None:
    """A cache that is accepted must also be of use."""
    import mlx.core as mx

    from mlx_dgemma.context.prompt_cache import PromptCache

    cache = PromptCache.load(path, models.demo[0])
    cache.align([*cache.ids, 5])
    models.demo[0].prefill([5], cache.cache)
    mx.eval(models.demo[0].denoise(mx.array([[1, 2, 3, 4]]), cache.cache))


def _replay(path: Path, models: _Models) -> None:
    from mlx_dgemma.replaying import replay

    replay(*models.demo, path)


class _Models:
    """Whole files, and the demo model, which caches and traces are of."""

    def __init__(self, whole: Path) -> None:
        from mlx_dgemma import load

        self.whole = whole
        self.demo = load()


def _memory(what: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most since `_reset_peak`; 0 without /proc."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def _reset_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


if __name__ == "__main__":
    sys.exit(main())
