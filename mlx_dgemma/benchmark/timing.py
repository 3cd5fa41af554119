"""Timing of prefill, denoising steps and commits, and of a step's components one by one.

Every figure is the median of several runs with the spread beside it. Components are timed apart,
each evaluated alone, so their sum is no step: a step overlaps them and waits once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma import kernels
from mlx_dgemma.benchmark.costs import Cost, loaded_bytes, prefill_costs, step_costs, total
from mlx_dgemma.decoding.block_result import BlockResult
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.decoding.step import Step
from mlx_dgemma.model import ContextCache, Model

_TEMPERATURE = 0.6


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs of one thing, and the work that a run is."""

    seconds: tuple[float, ...]
    cost: Cost

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance from the quickest run to the slowest."""
        return (max(self.seconds) - min(self.seconds)) / 2

    def record(self) -> dict[str, Any]:
        return {
            "ms": self.median * 1e3,
            "spread_ms": self.spread * 1e3,
            "runs_ms": [second * 1e3 for second in self.seconds],
            "gigabytes_per_second": self.cost.nbytes / self.median / 1e9,
            "teraflops": self.cost.flops / self.median / 1e12,
            **self.cost.record(),
        }


@dataclass(frozen=True)
class Workload:
    """What is timed: a prompt of so many tokens, so many steps per run, so many runs."""

    prompt_tokens: int = 1024
    steps: int = 6
    runs: int = 5
    settings: DecodingSettings = field(default_factory=DecodingSettings)


def time_passes(model: Model, load: Workload) -> dict[str, Timing]:
    """Prefill, a block's first step, a step with self-conditioning, and commit, by these names."""
    config, length = model.config, model.config.canvas_length
    found: dict[str, list[float]] = {
        name: [] for name in ("prefill", "first step", "step", "commit")
    }
    prompt = _ids(config.text.vocab_size, load.prompt_tokens)
    canvas = _ids(config.text.vocab_size, length, seed=1)
    for run in range(load.runs + 1):  # the first compiles and touches memory: not counted
        mx.clear_cache()
        cache = model.make_cache(load.settings.kv_bits)
        prefill = _timed(partial(_extend, model, prompt, cache))
        first, *later = steps(model, cache, load.settings, load.steps, seed=run)
        commit = _timed(partial(_extend, model, canvas, cache))
        if run:
            found["prefill"].append(prefill)
            found["first step"].append(first)
            found["step"].extend(later)
            found["commit"].append(commit)
    costs = _pass_costs(model, load)
    return {name: Timing(tuple(seconds), costs[name]) for name, seconds in found.items()}


def _pass_costs(model: Model, load: Workload) -> dict[str, Cost]:
    config, size, stored = model.config, model.dtype.size, loaded_bytes(model)
    kv_bits = load.settings.kv_bits
    step = partial(
        step_costs, config, load.prompt_tokens, item_size=size, stored=stored, kv_bits=kv_bits
    )
    prefill = partial(prefill_costs, config, item_size=size, stored=stored, kv_bits=kv_bits)
    sparse = load.settings.sparse_conditioning(8 * size)
    return {
        "prefill": total(prefill(load.prompt_tokens)),
        "first step": total(step(conditioning="none")),
        "step": total(step(conditioning="sparse" if sparse else "dense")),
        "commit": total(prefill(config.canvas_length, load.prompt_tokens)),
    }


def steps(
    model: Model, cache: ContextCache, settings: DecodingSettings, count: int, *, seed: int = 0
) -> list[float]:
    """Seconds of each of a block's first `count` steps; nothing stops before."""
    block = endless(model, cache, settings, count, seed=seed)
    mx.eval(cache.arrays)
    seconds, started = [], time.perf_counter()
    for _ in zip(range(count), block, strict=False):
        now = time.perf_counter()
        seconds.append(now - started)
        started = now
    block.close()
    return seconds


def endless(
    model: Model, cache: ContextCache, settings: DecodingSettings, count: int, *, seed: int = 0
) -> Generator[Step, None, list[BlockResult]]:
    """A block that takes `count` steps and more: a mean entropy is never below 0.

    It ends one step later, so that no counted step is the last, which conditions nothing.
    """
    without_end = replace(settings, max_denoising_steps=count + 1, confidence_threshold=0.0)
    return denoise_block(model, cache, without_end, [CanvasRequest(SeededDraws(seed))])


def time_components(model: Model, load: Workload) -> dict[str, Timing]:
    """Component -> time of its part of one denoising step, all layers together."""
    config, kv_bits = model.config, load.settings.kv_bits
    cache = model.make_cache(kv_bits)
    _extend(model, _ids(config.text.vocab_size, load.prompt_tokens), cache)
    cost = partial(
        step_costs,
        config,
        load.prompt_tokens,
        item_size=model.dtype.size,
        stored=loaded_bytes(model),
        kv_bits=kv_bits,
    )
    dense, sparse = cost(conditioning="dense"), cost(conditioning="sparse")
    costs = {**dense, "self-conditioning, sparse": sparse["self-conditioning"]}
    costs["self-conditioning, dense"] = costs.pop("self-conditioning")
    found: dict[str, Timing] = {}
    for name, parts in _components(model, cache):
        runs = []
        for _ in range(load.runs + 1):
            runs.append(sum(count * _timed(partial(_evaluate, part)) for count, part in parts))
        found[name] = Timing(tuple(runs[1:]), costs[name])
    return found


_Parts = list[tuple[int, Callable[[], Any]]]


def _components(model: Model, cache: ContextCache) -> Iterator[tuple[str, _Parts]]:
    """Name, and what to run how many times: one layer of a kind stands for all of its kind."""
    config, decoder, length = model.config, model.model.decoder, model.config.canvas_length
    text, rope = config.text, model.rope.span(cache.offset, length)
    x = mx.random.normal((1, length, text.hidden_size), key=mx.random.key(0)).astype(model.dtype)
    flat = x[0]
    mx.eval(x, flat)
    kinds = {layer.kind: index for index, layer in enumerate(decoder.layers[:-1])}
    kinds = kinds or {decoder.layers[-1].kind: 0}
    counts = {kind: text.layer_types.count(kind) for kind in kinds}
    missing = len(decoder.layers) - sum(counts.values())  # a last layer that is alone of its kind
    if missing:
        kinds[decoder.layers[-1].kind] = len(decoder.layers) - 1
        counts[decoder.layers[-1].kind] = missing
    attention: _Parts = []
    for kind, index in kinds.items():
        layer, context = decoder.layers[index], cache.layers[index]
        attention.append((counts[kind], partial(layer.self_attn.decode, x, rope[kind], context)))
    yield "attention", attention
    some = decoder.layers[0]
    everywhere = len(decoder.layers)
    yield "dense", [(everywhere, lambda: some.mlp(x))]
    routing = some.router(flat)
    mx.eval(routing)
    yield "router", [(everywhere, lambda: some.router(flat))]
    yield "experts", [(everywhere, lambda: some.experts(flat, routing))]
    raw = model.raw_logits(x)[0]
    mx.eval(raw)
    yield "head", [(1, lambda: model.raw_logits(x))]
    uniforms, ids = mx.random.uniform(shape=(length, 2)), mx.zeros((1, length), mx.int32)
    mx.eval(uniforms, ids)
    yield "sampler", [(1, lambda: _sample(raw, uniforms, ids))]
    softcap = text.final_logit_softcapping
    stats = kernels.row_statistics(raw, _TEMPERATURE, uniforms, softcap=softcap)
    sharp = raw * 64.0  # few tokens carry the probability, as in a block's later steps
    peaked = kernels.row_statistics(sharp, _TEMPERATURE, uniforms, softcap=softcap)
    mx.eval(stats, sharp, peaked)
    table = model.embedding_matrix

    def conditioned(soft: mx.array) -> mx.array:
        return decoder.self_conditioning.condition(x, soft[None])

    def densely() -> mx.array:
        return conditioned(
            kernels.soft_embeddings(raw, stats.log_z, _TEMPERATURE, table, softcap=softcap)
        )

    def sparsely() -> mx.array:
        few = kernels.select_survivors(
            sharp, peaked.log_z, _TEMPERATURE, table.dtype, softcap=softcap
        )
        return conditioned(
            kernels.gather_soft_embeddings(
                few, table, np.array(few.counts), scale=model.embed_scale
            )
        )

    yield "self-conditioning, dense", [(1, densely)]
    yield "self-conditioning, sparse", [(1, sparsely)]


def _sample(raw: mx.array, uniforms: mx.array, ids: mx.array) -> tuple[mx.array, ...]:
    stats = kernels.row_statistics(raw, _TEMPERATURE, uniforms)
    draft, sample = stats.argmax[None], stats.sample[None]
    return kernels.accept_renoise(ids, stats.entropy[None], draft, sample, ids, draft, 0.1)


def _extend(model: Model, ids: np.ndarray, cache: ContextCache) -> None:
    model.prefill(ids, cache)
    mx.eval(cache.arrays)


def _evaluate(part: Callable[[], Any]) -> None:
    mx.eval(part())


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _ids(vocabulary: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (1, count), dtype=np.int32)
