"""A context in 8 bits: what it saves, and what it costs in exactness, answers and time.

    python studies/context_cache.py                       # everything; minutes on a CPU
    python studies/context_cache.py --part answers --n 50

bytes       of the context, computed for the published shapes and counted in the demo's buffers
divergence  of the demo's tempered distributions from the exact context's, with keys, values or
            both in 8 bits, over the denoising states of a reply after earlier turns
layer       error of one random layer's attention at the published widths, by how peaked it is
answers     of the demo to held-out questions, alone and after earlier turns, which it never saw
            in training, and its denoising steps
time        of a step with the published attention in one layer of six, by turns
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_dgemma import load
from mlx_dgemma.benchmark.quality import MAX_TOKENS, SEED, ask
from mlx_dgemma.benchmark.synthetic import medium_config, published_config
from mlx_dgemma.benchmark.timing import endless
from mlx_dgemma.checkpoint import sizes
from mlx_dgemma.checkpoint.random_weights import synthetic_model
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.decoding.temperature import temperature
from mlx_dgemma.demo.tasks import TASKS, Example, held_out
from mlx_dgemma.generate import encode_prompt
from mlx_dgemma.kernels.attention import Segment, attend
from mlx_dgemma.model import ContextCache, Model
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.layer_context import LayerContext
from mlx_dgemma.model.packed_context import pack, unpack

PLAIN = tuple(task for task in TASKS if task not in ("tool", "think"))
EXACT, KEYS, VALUES, PACKED = "exact", "keys in 8 bits", "values in 8 bits", "both in 8 bits"
BFLOAT = "both in bfloat16"


class Rounded(LayerContext):
    """A full layer that keeps what 8 bits keep of its committed keys or values, or of both."""

    def __init__(self, room: int, *, keys: bool, values: bool):
        super().__init__(None, room)
        self.rounds = keys, values

    def append(self, keys: mx.array, values: mx.array) -> list[Segment]:
        before = self.used
        kept = zip((keys, values), self.rounds, strict=True)
        self._write(tuple(rounded(rows) if rounds else rows for rows, rounds in kept))
        self.used += keys.shape[2]
        return [*(self._span(0, before) if before else []), (keys, values)]


def rounded(rows: mx.array) -> mx.array:
    return unpack(pack(rows), rows.dtype)


def make_cache(model: Model, kind: str) -> ContextCache:
    cache = model.make_cache(8 if kind == PACKED else None)
    if kind in (KEYS, VALUES):
        cache.layers = [
            Rounded(cache.layers[0].room, keys=kind == KEYS, values=kind == VALUES)
            if layer.window is None
            else layer
            for layer in cache.layers
        ]
    return cache


def after_turns(task: str, number: int, turns: int) -> Example:
    """A held-out question after `turns` earlier ones of all tasks, with their right answers."""
    messages = []
    for turn in range(turns):
        other = PLAIN[(PLAIN.index(task) + turn + number) % len(PLAIN)]
        example = held_out(other, number + 1, seed=SEED + 1 + turn)[number]
        messages += [*example.messages, {"role": "assistant", "content": example.answer}]
    question = held_out(task, number + 1, seed=SEED)[number]
    return replace(question, messages=[*messages, *question.messages])


def count_bytes(model: Model) -> dict[str, Any]:
    real = ModelConfig.from_dict(published_config())
    found: dict[str, Any] = {"published": [], "demo": {}}
    for tokens in (8192, 262_144):
        exact, packed = (sizes.context_bytes(real, tokens, bits) for bits in (None, 8))
        found["published"].append({"tokens": tokens, "exact": exact, "packed": packed})
    for name, bits in (("exact", None), ("packed", 8)):
        cache = model.make_cache(bits)
        model.prefill(np.zeros((1, 4096), np.int32), cache)
        mx.eval(cache.arrays)
        full = [layer for layer in cache.layers if layer.window is None]
        sizes = [sum(buffer.nbytes for buffer in layer.buffers) for layer in full]
        found["demo"][name] = {"all": cache.nbytes, "full layers": sum(sizes)}
    return found


def divergence(model: Model, tokenizer: Any, replies: int, turns: int) -> dict[str, Any]:
    """KL(exact || other) in nats, per canvas position and denoising step."""
    kinds = (KEYS, VALUES, PACKED)
    settings = DecodingSettings.from_defaults(model.config.generation, {})
    kl: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    same: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    lengths = []
    for number in range(replies):
        example = after_turns(PLAIN[number % len(PLAIN)], number // len(PLAIN), turns)
        ids = encode_prompt(tokenizer, example.messages)
        lengths.append(len(ids))
        caches = {kind: make_cache(model, kind) for kind in (EXACT, *kinds)}
        for cache in caches.values():
            model.prefill(np.array(ids)[None], cache)
        request = CanvasRequest(SeededDraws(number))
        before = None
        for step in denoise_block(model, caches[EXACT], settings, [request]):
            left = settings.max_denoising_steps + 1 - step.places[0].step
            now = temperature(left, settings.max_denoising_steps, settings.t_min, settings.t_max)
            tempered = {
                kind: model.denoise(step.canvas, cache, before) / now
                for kind, cache in caches.items()
            }
            before = tempered[EXACT]
            log_p = before - mx.logsumexp(before, axis=-1, keepdims=True)
            for kind in kinds:
                other = tempered[kind]
                log_q = other - mx.logsumexp(other, axis=-1, keepdims=True)
                kl[kind].append(np.array((mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)))
                same[kind].append(np.array(before.argmax(axis=-1) == other.argmax(axis=-1)))
    return {
        "prompt tokens": statistics.median(lengths),
        "positions": sum(map(np.size, kl[PACKED])),
        **{
            kind: {
                "mean": float(np.concatenate(kl[kind], axis=None).mean()),
                "99%": float(np.quantile(np.concatenate(kl[kind], axis=None), 0.99)),
                "same top-1": float(np.concatenate(same[kind], axis=None).mean()),
            }
            for kind in kinds
        },
    }


def layer_error(count: int = 8192, queries: int = 16) -> list[dict[str, float]]:
    """Relative error of the output of random attention, by the scores' standard deviation."""
    found = []
    keys, values = mx.random.normal((2, 1, 2, count, 512), key=mx.random.key(0))
    for spread in (1.0, 4.0, 16.0):
        asked = mx.random.normal((1, 16, queries, 512), key=mx.random.key(1))
        asked = asked * (spread / 512**0.5)
        exact = attend(asked, [(keys, values)])
        row = {"spread": spread}
        for kind, pair in (
            (KEYS, (rounded(keys), values)),
            (VALUES, (keys, rounded(values))),
            (PACKED, (rounded(keys), rounded(values))),
            (BFLOAT, tuple(rows.astype(mx.bfloat16).astype(mx.float32) for rows in (keys, values))),
        ):
            error = attend(asked, [pair]) - exact
            row[kind] = (mx.sqrt((error**2).sum()) / mx.sqrt((exact**2).sum())).item()
        found.append(row)
    return found


def answers(model: Model, tokenizer: Any, n: int, turns: int) -> dict[str, Any]:
    """Share of right answers and denoising steps per block, to the same questions and seeds."""
    outcomes: dict[str, list[Any]] = {EXACT: [], PACKED: []}
    for task in PLAIN:
        for number in range(n):
            example = after_turns(task, number, turns)
            for kind, kv_bits in ((EXACT, None), (PACKED, 8)):
                outcomes[kind].append(
                    ask(
                        model,
                        tokenizer,
                        example,
                        seed=number,
                        max_tokens=MAX_TOKENS,
                        kv_bits=kv_bits,
                    )
                )
    found: dict[str, Any] = {}
    for kind, given in outcomes.items():
        right = statistics.fmean(answer.right for answer in given)
        found[kind] = {
            "right": right,
            "error": (right * (1 - right) / len(given)) ** 0.5,
            "steps": statistics.fmean(step for answer in given for step in answer.steps),
            "n": len(given),
        }
    pairs = list(zip(outcomes[EXACT], outcomes[PACKED], strict=True))
    found["only exact is right"] = sum(one.right and not other.right for one, other in pairs)
    found["only 8 bits are right"] = sum(other.right and not one.right for one, other in pairs)
    found["same steps"] = statistics.fmean(one.steps == other.steps for one, other in pairs)
    return found


def step_time(context: int, rounds: int) -> dict[str, float]:
    """Processor seconds of a step, medians, the two kinds by turns."""
    raw = medium_config()
    real = published_config()["text_config"]
    same = ("num_attention_heads", "num_global_key_value_heads", "global_head_dim")
    raw["text_config"] |= {name: real[name] for name in same} | {"vocab_size": 1024}
    model = synthetic_model(raw | {"vision_config": None})
    caches = {EXACT: model.make_cache(), PACKED: model.make_cache(8)}
    full = next(i for i, layer in enumerate(caches[EXACT].layers) if layer.window is None)
    text = model.config.text
    for cache in caches.values():  # random keys stand for a prompt: reading one takes long here
        for index, layer in enumerate(cache.layers):
            count = context if index == full else min(context, layer.window or context)
            shape = (2, 1, text.kv_heads_of(index), count, text.head_dim_of(index))
            layer.reset(context - count, None)
            layer.append(*mx.random.normal(shape, key=mx.random.key(index)) * 0.3)
        mx.eval(cache.arrays)
    seconds: dict[str, list[float]] = {kind: [] for kind in caches}
    for _ in range(rounds):
        for kind, cache in caches.items():
            seconds[kind] += _steps(model, cache)
    found = {kind: statistics.median(times) for kind, times in seconds.items()}
    return {**found, "ratio": found[PACKED] / found[EXACT], "context": context}


def _steps(model: Model, cache: ContextCache, count: int = 2) -> list[float]:
    moments = [time.process_time()]
    block = endless(model, cache, DecodingSettings(), count + 1)
    for _ in zip(range(count + 1), block, strict=False):
        moments.append(time.process_time())
    block.close()
    return [b - a for a, b in pairwise(moments[1:])]  # the first conditions on nothing


def show(name: str, found: Any, console: Console) -> None:
    if name == "bytes":
        table = Table("published shapes", "exact GB", "8 bits GB")
        for row in found["published"]:
            table.add_row(
                f"{row['tokens']:,}", f"{row['exact'] / 1e9:.2f}", f"{row['packed'] / 1e9:.2f}"
            )
        console.print(table)
        demo = found["demo"]
        for part in ("all", "full layers"):
            exact, packed = demo["exact"][part], demo["packed"][part]
            console.print(f"demo in float32, {part}: {packed:,} of {exact:,} bytes")
    elif name == "divergence":
        table = Table("", "mean KL", "99%", "same top-1")
        for kind in (KEYS, VALUES, PACKED):
            row = found[kind]
            cells = (f"{row['mean']:.1e}", f"{row['99%']:.1e}", f"{row['same top-1']:.4f}")
            table.add_row(kind, *cells)
        console.print(table)
        console.print(
            f"{found['positions']:,} positions, {found['prompt tokens']:.0f} tokens before"
        )
    elif name == "layer":
        kinds = (KEYS, VALUES, PACKED, BFLOAT)
        table = Table("scores' spread", *kinds)
        for row in found:
            cells = (f"{row[kind]:.2%}" for kind in kinds)
            table.add_row(f"{row['spread']:.0f}", *cells)
        console.print(table)
    elif name == "answers":
        for where, figures in found.items():
            console.print(where)
            for kind in (EXACT, PACKED):
                row = figures[kind]
                told = f"{row['right']:.3f} ± {row['error']:.3f} right in {row['steps']:.2f} steps"
                console.print(f"  {kind}: {told}, n = {row['n']}")
            for note in ("only exact is right", "only 8 bits are right", "same steps"):
                console.print(f"  {note}: {figures[note]:.3g}")
    else:
        console.print(
            f"a step after {found['context']:,} tokens: {found[EXACT]:.2f} CPU seconds exactly, "
            f"{found[PACKED]:.2f} in 8 bits ({found['ratio']:.2f})"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("bytes", "divergence", "layer", "answers", "time")
    parser.add_argument("--part", action="append", choices=parts, help="default: all")
    parser.add_argument("--n", type=int, default=15, help="questions per task (default: 15)")
    parser.add_argument("--replies", type=int, default=27, help="of divergence (default: 27)")
    parser.add_argument("--turns", type=int, default=12, help="before a question (default: 12)")
    parser.add_argument("--context", type=int, default=8192, help="of time (default: 8192)")
    parser.add_argument("--rounds", type=int, default=3, help="of time (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    arguments = parser.parse_args(argv)
    model, tokenizer = load()
    measure: dict[str, Callable[[], Any]] = {
        "bytes": lambda: count_bytes(model),
        "divergence": lambda: divergence(model, tokenizer, arguments.replies, arguments.turns),
        "layer": layer_error,
        "answers": lambda: {
            f"after {turns} turns": answers(model, tokenizer, arguments.n, turns)
            for turns in (0, arguments.turns)
        },
        "time": lambda: step_time(arguments.context, arguments.rounds),
    }
    console, found = Console(), {}
    for part in arguments.part or parts:
        found[part] = measure[part]()
        show(part, found[part], console)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
