"""Peak memory and throughput of a conversion with the real model's shapes.

    python studies/convert.py --recipe 4bit --real-layers 2

Writes a sparse stand-in for the 52 GB checkpoint, converts it in a child process, and samples
that process's anonymous memory (RssAnon; file-backed pages belong to the system's cache). The
plain loop reads and quantizes the tensors of the first layer and writes nothing. Says on standard
error how far it is. Needs free disk for the output (17 GB for 4bit) and, with real layers, 1.6 GB
for each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import mlx.core as mx
from real_shapes import fill, published_config, write_sparse

from mlx_dgemma.convert import convert
from mlx_dgemma.convert.plan import make_plan
from mlx_dgemma.convert.recipes import recipe_named
from mlx_dgemma.convert.source import dense_shapes, open_source
from mlx_dgemma.model.config import ModelConfig

SAY_SECONDS = 30


def resident(pid: int, field: str) -> int:
    """A field of /proc/PID/status in bytes; 0 when it cannot be read."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def work(source: str, target: str, recipe: str, answer) -> None:
    began = said = time.perf_counter()

    def say(what: str, done: int, total: int) -> None:
        nonlocal said
        if time.perf_counter() - said > SAY_SECONDS:
            said = time.perf_counter()
            print(f"{what} {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)

    report = convert(source, target, recipe=recipe, progress=say)
    answer.put({"seconds": time.perf_counter() - began, **report.as_dict()})


def measured(source: Path, target: Path, recipe: str) -> dict:
    """Convert in a child process and sample its memory every 50 ms."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=work, args=(str(source), str(target), recipe, answer))
    child.start()
    peak = {"RssAnon": 0}
    done = threading.Event()

    def sample() -> None:
        said = time.perf_counter()
        while not done.wait(0.05):
            peak["RssAnon"] = max(peak["RssAnon"], resident(child.pid, "RssAnon"))
            if time.perf_counter() - said > SAY_SECONDS:
                said = time.perf_counter()
                so_far = peak["RssAnon"] / 1e6
                print(f"peak RssAnon so far {so_far:.0f} MB", file=sys.stderr, flush=True)

    sampler = threading.Thread(target=sample)
    sampler.start()
    result = answer.get()
    child.join()
    done.set()
    sampler.join()
    return {**result, "peak_rss_anon_bytes": peak["RssAnon"]}


def plain_loop(source: Path, recipe: str, prefix: str) -> dict:
    """Read and quantize whole tensors with nothing around it."""
    with open_source(source) as opened:
        shapes = dense_shapes(opened.config)
        plan = make_plan(
            opened.config, opened.raw_config, shapes, recipe_named(recipe), dtype="bfloat16"
        )
        count, began = 0, time.perf_counter()
        for step in plan.steps:
            if step.name.startswith(prefix):
                tensor = opened.tensors[step.name]
                array = tensor.rows(0, step.shape[0])
                precision = step.precision
                mx.eval(
                    array
                    if precision is None
                    else mx.quantize(array, precision.group_size, precision.bits, precision.mode)
                )
                count += tensor.nbytes
        seconds = time.perf_counter() - began
    return {"bytes": count, "seconds": seconds, "bytes_per_second": count / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="4bit")
    parser.add_argument("--layers", type=int, default=30, help="layers of the stand-in")
    parser.add_argument("--real-layers", type=int, default=2, help="layers with random numbers")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()

    root = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=args.folder))
    try:
        config = published_config()
        text = config["text_config"]
        text["num_hidden_layers"] = args.layers
        text["layer_types"] = [*text["layer_types"][: args.layers - 1], "full_attention"]
        shards = write_sparse(root / "source", config)
        real = [f"model.decoder.layers.{index}." for index in range(args.real_layers)]
        filled = fill(root / "source", shards, *real) if real else 0
        loop = plain_loop(root / "source", args.recipe, "model.decoder.layers.0.")
        result = measured(root / "source", root / "target", args.recipe)
        speed = result["source_bytes"] / result["seconds"]
        print(
            json.dumps(
                {
                    "recipe": args.recipe,
                    "layers": ModelConfig.from_dict(config).text.num_hidden_layers,
                    "source_bytes": result["source_bytes"],
                    "bytes_with_real_numbers": filled,
                    "output_bytes": result["total_size"],
                    "seconds": round(result["seconds"], 1),
                    "bytes_per_second": round(speed),
                    "plain_loop_bytes_per_second": round(loop["bytes_per_second"]),
                    "slower_than_plain_loop": round(loop["bytes_per_second"] / speed, 2),
                    "peak_rss_anon_bytes": result["peak_rss_anon_bytes"],
                },
                indent=2,
            ),
            file=sys.stdout,
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
