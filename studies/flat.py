"""What must not grow: prefill's working memory with the prompt, a step's cost with the blocks.

    python studies/flat.py                    # 4k to 64k tokens, 20 blocks; minutes on a CPU
    python studies/flat.py --tokens 4096 16384 --blocks 5
    python studies/flat.py --tokens --published # steps at the published widths; needs OpenBLAS
    python studies/flat.py --generations 50     # the same reply again and again, by the demo

A small synthetic network with the published pattern of layers: five that see a window, one that
sees everything, twice. A step is timed in the processor's own seconds, which other programs hardly
disturb, once with all layers and once with one full layer of twelve: what is left of the growth
then is that layer's.

The small network's attention is out of proportion to the rest. The mid-size one has the published
vocabulary and canvas, and one full layer of six. `--published` takes a fifth of the
published network at its own widths: six layers, a fifth of the vocabulary, a window of 1,024,
canvases of 256 after a prompt of 1,024. The eight experts' width is given to the dense branch: the
same arithmetic, without the CPU backend's slow gathered products, which would hide the growth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_dgemma import generate, load
from mlx_dgemma.benchmark.synthetic import (
    SLIDING,
    medium_config,
    published_config,
    synthetic_config,
    with_layers,
)
from mlx_dgemma.benchmark.timing import endless
from mlx_dgemma.checkpoint.random_weights import synthetic_model
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.model import ContextCache, Model


def small(*, full_layers: bool = True) -> Model:
    """Twelve narrow layers over a vocabulary of 1,024, canvases of 64, a window of 256.

    The sixth sees everything, in prefill too; of the twelfth, prefill takes the keys alone.
    """
    raw = with_layers(medium_config(), 12)
    text = raw["text_config"] | {
        "vocab_size": 1024,
        "hidden_size": 64,
        "sliding_window": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 16,
    }
    if not full_layers:  # the last layer must see everything, and the others need not
        text["layer_types"] = [SLIDING] * 11 + text["layer_types"][-1:]
    return synthetic_model(raw | {"text_config": text, "canvas_length": 64, "vision_config": None})


def published() -> Model:
    """A fifth of the published network at its own widths, dense; 3.2 GB in float32."""
    raw = with_layers(published_config(), 6)
    text = raw["text_config"]
    text |= {
        "dtype": "float32",
        "vocab_size": text["vocab_size"] // 5,
        "intermediate_size": text["intermediate_size"]
        + text["top_k_experts"] * text["moe_intermediate_size"],
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 64,
    }
    return synthetic_model(raw | {"dtype": "float32", "vision_config": None})


def prefill_memory(model: Model, tokens: int) -> dict[str, float]:
    """Bytes that reading a prompt took at its height, above weights and the finished context."""
    cache = model.make_cache()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model.prefill(_ids(tokens), cache)
    mx.eval(cache.arrays)
    peak = mx.get_peak_memory() - before
    return {"tokens": tokens, "context": cache.nbytes, "working": peak - cache.nbytes}


def step_costs(model: Model, blocks: int, prompt: int, rounds: int = 7) -> tuple[float, float]:
    """Processor seconds of a step in the first block and in the last, medians, taken by turns."""
    first, last = model.make_cache(), model.make_cache()
    _commit(model, first, prompt)
    _commit(model, last, prompt + (blocks - 1) * model.config.canvas_length)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for found, cache in zip(seconds, (first, last), strict=True):
            found += _step_seconds(model, cache)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _commit(model: Model, cache: ContextCache, tokens: int) -> None:
    """A context of random keys and values: a step's cost does not hang on what they are."""
    attentions = [layer.self_attn for layer in model.model.decoder.layers]
    for layer, attention in zip(cache.layers, attentions, strict=True):
        shape = (1, attention.kv_heads, tokens, attention.head_dim)
        layer.append(mx.random.normal(shape), mx.random.normal(shape))
    mx.eval(cache.arrays)


def _step_seconds(model: Model, cache: ContextCache, steps: int = 3) -> list[float]:
    mx.eval(cache.arrays)
    moments = [time.process_time()]
    block = endless(model, cache, DecodingSettings(), steps + 1)
    for _ in zip(range(steps + 1), block, strict=False):
        moments.append(time.process_time())
    block.close()
    return [b - a for a, b in pairwise(moments[1:])]  # the first conditions on nothing


def generations(count: int) -> dict[str, list[float]]:
    """The demo's reply to one prompt with one seed, `count` times: CPU seconds, and bytes held."""
    model, tokenizer = load()
    found: dict[str, list[float]] = {"seconds": [], "bytes": []}
    for _ in range(count):
        before = time.process_time()
        generate(model, tokenizer, "Write a sentence about the happy robot.", seed=1)
        found["seconds"].append(time.process_time() - before)
        found["bytes"].append(mx.get_active_memory())
    return found


def _ids(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 1024, (1, count), dtype=np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[4096, 16_384, 65_536], metavar="N"
    )
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--published", action="store_true", help="steps at the published widths")
    parser.add_argument("--generations", type=int, metavar="N", help="nothing but N replies")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    arguments = parser.parse_args()
    console = Console()
    if arguments.generations:
        taken = generations(arguments.generations)
        some = max(1, arguments.generations // 5)
        early, late = taken["seconds"][1 : some + 1], taken["seconds"][-some:]
        console.print(
            f"{arguments.generations} replies: {statistics.median(early) * 1e3:.0f} CPU ms each "
            f"at first, {statistics.median(late) * 1e3:.0f} at last "
            f"(medians of {some}, the very first left out); "
            f"{taken['bytes'][2] / 1e6:.2f} MB held after three, {taken['bytes'][-1] / 1e6:.2f} "
            "after all"
        )
        return
    found: dict[str, Any] = {"prefill": [], "steps": {}}
    table = Table("prompt", "context MB", "working MB")
    small_one = small()
    for tokens in arguments.tokens:
        values = prefill_memory(small_one, tokens)
        found["prefill"].append(values)
        table.add_row(
            f"{tokens:,}", f"{values['context'] / 1e6:.1f}", f"{values['working'] / 1e6:.1f}"
        )
    console.print(table)
    mid_size = synthetic_config("medium")
    networks = [
        ("one layer of six sees all", lambda: small_one, 512, 7),
        ("one of twelve", lambda: small(full_layers=False), 512, 7),
        ("mid-size, the real vocabulary", lambda: synthetic_model(mid_size), 1024, 3),
    ]
    if arguments.published:
        networks = [("published widths", published, 1024, 3)]
    for name, network, prompt, rounds in networks:
        first, last = step_costs(network(), arguments.blocks, prompt, rounds)
        found["steps"][name] = {"first": first, "last": last}
        console.print(
            f"{name}: a step takes {first * 1e3:.1f} CPU ms in the first block, "
            f"{last * 1e3:.1f} in block {arguments.blocks} ({last / first - 1:+.1%})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
