"""The counting of `bytes_moved.py`; imported once `mx.compile` is replaced."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import mlx.core as mx

from mlx_dgemma.benchmark import graph
from mlx_dgemma.benchmark.synthetic import synthetic_config
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.denoise import step
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels import dispatch, registry
from mlx_dgemma.kernels.table import operations
from mlx_dgemma.model.config import ModelConfig

PERIOD, EXPERTS, LAYERS, ALL_EXPERTS = 6, 16, 30, 128
CONTEXT = 1024


def moved(build: Any, chains: Counter[str]) -> Counter[str]:
    """Kind of launch -> bytes, of everything that `build()` describes."""
    tally: Counter[str] = Counter()
    traced: list[dict[str, Any]] = []
    chains.clear()
    with ExitStack() as stack:
        for module, name in ((mx.fast, "rms_norm"), (mx, "softmax")):
            real = getattr(module, name)
            stack.enter_context(graph._swapped(module, name, _norm(tally, name, real)))
        stack.enter_context(
            graph._swapped(dispatch, "use", partial(graph._supported, operations()))
        )
        stack.enter_context(graph._swapped(registry, "launch", _launch(tally)))
        # of tables that are so already; it cannot be traced
        stack.enter_context(graph._swapped(mx, "contiguous", lambda x: x))
        mx.export_function(traced.append, build)
    return tally + chains + _primitives(traced)


def _norm(tally: Counter[str], name: str, real: Any) -> Any:
    def call(x: mx.array, *arguments: Any, **keywords: Any) -> mx.array:
        tally[name] += 2 * x.nbytes
        return graph._placeholder([(x.shape, x.dtype)], [x])[0]

    return call


def _launch(tally: Counter[str]) -> Any:
    def call(kernel: Any, inputs: Any, *, outputs: Any, **_: Any) -> list[mx.array]:
        written = sum(prod(shape) * dtype.size for shape, dtype in outputs)
        tally[f"Metal: {kernel.name}"] += written + sum(one.nbytes for one in inputs)
        return graph._placeholder(outputs, inputs)

    return call


def _primitives(traced: list[dict[str, Any]]) -> Counter[str]:
    tally: Counter[str] = Counter()
    size: dict[str, int] = {}  # of arrays that views make smaller than they look
    for event in traced:
        if event["type"] != "primitive":
            continue
        name = event["name"]
        inputs = [size.get(key, _nbytes(shape, dtype)) for key, shape, dtype in event["inputs"]]
        outputs = [_nbytes(shape, dtype) for _, shape, dtype in event["outputs"]]
        if name in graph._VIEWS:
            for (key, *_), nbytes, own in zip(
                event["outputs"], outputs, (*inputs, *[1 << 62] * len(outputs)), strict=False
            ):
                size[key] = min(nbytes, own)
        elif name == "Gather":
            tally[name] += 2 * outputs[0] + sum(inputs[1:])
        elif name in ("SliceUpdate", "Scatter"):
            tally[name] += 2 * inputs[1]
        else:
            kind = "Compiled" if name.startswith("Compiled") else name
            tally[kind] += sum(inputs) + sum(outputs)
    return tally


def _nbytes(shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    return prod(shape) * dtype.size


def one_period() -> ModelConfig:
    config = ModelConfig.from_dict(synthetic_config("26b-4bit"))
    layers = config.text.layer_types[:PERIOD]
    text = replace(config.text, layer_types=layers, num_experts=EXPERTS)
    return replace(config, text=text, vision=None)


def report(chains: Counter[str]) -> None:
    """Prints the bytes of a dense step by kind of launch; `chains` collects those of elementwise
    chains."""
    graph._CONTEXT = CONTEXT
    config = one_period()
    model = graph._hollow(config)
    model.prepare()
    cache, length = graph._context(model), config.canvas_length
    request, vocabulary = CanvasRequest(SeededDraws(0)), config.text.vocab_size
    state = CanvasState.initial([request], Place(0, 0, 0), length, vocabulary, 48)
    state.canvas = state.draft = mx.zeros((1, length), mx.int32)
    state.signal = mx.zeros((1, length, config.text.hidden_size), model.dtype)
    mx.eval(state.canvas, state.revealed, state.signal)
    settings = DecodingSettings(conditioning="dense")

    def whole() -> list[mx.array]:
        outcome = step(model, cache, settings, state, dispatch=False)
        seen = outcome.seen
        signal = seen.logits.signal(seen.stats, seen.temperature)
        return [outcome.decision.canvas, outcome.report.packed, signal]

    def layers() -> list[mx.array]:
        x, rope = state.signal, model.rope.span(cache.offset, length)
        for layer, context in zip(model.layers, cache.layers, strict=True):
            x = layer.decode(x, rope[layer.kind], context)
        return [x]

    step_bytes, layer_bytes = moved(whole, chains), moved(layers, chains)
    periods = LAYERS // PERIOD
    total = Counter({kind: step_bytes[kind] for kind in step_bytes})
    for kind, nbytes in layer_bytes.items():
        total[kind] += (periods - 1) * nbytes
    experts = model.layers[0].experts.parameters()
    weights = sum(part.nbytes for matrix in experts.values() for part in matrix.values())
    total["Metal: experts"] += LAYERS * weights * (ALL_EXPERTS - EXPERTS) // EXPERTS
    for kind, nbytes in total.most_common():
        if nbytes > 1e7:
            print(f"{kind:<28} {nbytes / 1e9:8.2f} GB")
    print(f"{'all launches':<28} {total.total() / 1e9:8.2f} GB")
