"""What a precision costs: recipes and learned roundings against the unquantized demo checkpoint.

    python studies/quantization.py                # every recipe, with whole generations
    python studies/quantization.py --learned      # plain rounding, mlx-lm's GPTQ, AWQ and DWQ

The learned methods round the experts to 4 bits in groups of 64 and leave everything else as the
recipe `4bit` does. They are calibrated on states of denoising trajectories (context, canvas,
signal: what both passes see), and judged on those of other prompts. mlx-lm's programs do not
read this architecture; its functions do, once the experts are modules of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.quant.awq import search_best_clip, search_best_scale
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.gptq import gptq_quantize

from mlx_dgemma.checkpoint.hub import demo_path
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.measure import Figures, Measurement, compare, demo_examples, measure
from mlx_dgemma.convert.plan import make_plan
from mlx_dgemma.convert.recipes import RECIPES, parse_rule
from mlx_dgemma.convert.source import Tensor, dense_shapes, open_source
from mlx_dgemma.convert.streamed import Streamed
from mlx_dgemma.convert.trajectories import State, record
from mlx_dgemma.model import Model, experts

BITS, GROUP = 4, 64
PROJECTIONS = ("gate_up_proj", "down_proj")
Dense = dict[str, mx.array]


@dataclass(frozen=True)
class Held:
    """A weight in memory in place of one in a file."""

    array: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def rows(self, start: int, stop: int) -> mx.array:
        return self.array[start:stop]

    def files(self) -> Iterable[Any]:
        return ()


def rounded(weight: mx.array) -> mx.array:
    return mx.dequantize(*mx.quantize(weight, GROUP, BITS), group_size=GROUP, bits=BITS)


class Calibrated(nn.Module):
    """The network on recorded states, its experts as mlx-lm's modules.

    Called with states, or with their canvases [B, C], by which it knows them: mlx-lm's training
    loop hands over tokens. Returns logits [B, C, V].
    """

    def __init__(self, folder: Path, states: Sequence[State]) -> None:
        super().__init__()
        self.model: Model = load_model(folder, lazy=True)
        self._states = {state.canvas.tobytes(): state for state in states}
        self._contexts: dict[tuple[int, ...], Any] = {}
        for layer in self.model.model.decoder.layers:
            for name in PROJECTIONS:
                weight = layer.experts[name].weight.astype(mx.float32)
                experts, width_out, width_in = weight.shape
                module = SwitchLinear(width_in, width_out, experts, bias=False)
                module.weight = weight
                layer.experts[name] = module
        self.freeze()

    def __call__(self, batch: mx.array | Sequence[State]) -> mx.array:
        if isinstance(batch, mx.array):
            batch = [self._states[row.tobytes()] for row in np.array(batch, dtype=np.int32)]
        return mx.concatenate([self._logits(state) for state in batch])

    def keep_contexts(self) -> None:
        """Prefill every context once and for all: the encoder pass cannot be differentiated."""
        self._contexts = {state.context: self._context(state) for state in self._states.values()}

    def _context(self, state: State) -> Any:
        cache = self.model.make_cache()
        self.model.prefill(mx.array([state.context]), cache)
        return cache

    def _logits(self, state: State) -> mx.array:
        cache = self._contexts.get(state.context) or self._context(state)
        signal = None if state.signal is None else mx.array(state.signal[None])
        hidden = self.model.hidden(mx.array(state.canvas[None]), cache, signal)
        return self.model.softcap(self.model.raw_logits(hidden))

    def experts(self) -> dict[str, nn.Module]:
        """Weight name -> module."""
        return {
            f"model.decoder.layers.{index}.experts.{name}.weight": layer.experts[name]
            for index, layer in enumerate(self.model.model.decoder.layers)
            for name in PROJECTIONS
        }

    def dense(self) -> Dense:
        """Every packed expert weight, dequantized."""
        return {
            name: mx.dequantize(
                module.weight, module.scales, module.biases, group_size=GROUP, bits=BITS
            )
            for name, module in self.experts().items()
        }


def plain(folder: Path, states: Sequence[State]) -> Dense:
    network = Calibrated(folder, states)
    return {name: rounded(module.weight) for name, module in network.experts().items()}


def gptq(folder: Path, states: Sequence[State]) -> Dense:
    network = Calibrated(folder, states)
    gptq_quantize(network, list(states), BITS, GROUP, BITS, GROUP)
    return network.dense()


class Listening(nn.Module):
    """Remembers what an expert matrix was given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.heard = module, []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.heard.append((x, indices))
        return self.module(x, indices)


def awq(folder: Path, states: Sequence[State], *, rows: int = 4096) -> Dense:
    """Scales of input channels, which fold into the norm or the matrix before, then clipping."""
    network = Calibrated(folder, states)
    layers = network.model.model.decoder.layers
    for layer in layers:
        for name in PROJECTIONS:
            layer.experts[name] = Listening(layer.experts[name])
    for state in states:
        mx.eval(network([state]))
    found: Dense = {}
    for index, layer in enumerate(layers):
        for name in PROJECTIONS:
            heard = layer.experts[name]
            x, indices = (mx.concatenate(parts) for parts in zip(*heard.heard, strict=True))
            step = max(1, -(-x.shape[0] // rows))
            module = heard.module
            module.input_feat = x[::step]
            scales = search_best_scale(
                [module], rounded, None, {"indices": indices[::step]}, n_grid=20
            )
            module.weight = module.weight * scales
            module.input_feat = module.input_feat / scales
            clipped = search_best_clip(module, rounded, GROUP, n_grid=20)
            found[f"model.decoder.layers.{index}.experts.{name}.weight"] = rounded(clipped) / scales
            mx.eval(found)
            heard.heard.clear()
    return found


def dwq(folder: Path, states: Sequence[State], *, rate: float = 1e-5) -> Dense:
    """Scales and biases trained so that the tempered logits stay the same."""
    import mlx.optimizers as optimizers

    teacher, student = Calibrated(folder, states), Calibrated(folder, states)
    for layer in student.model.model.decoder.layers:
        for name in PROJECTIONS:
            layer.experts[name] = layer.experts[name].to_quantized(GROUP, BITS)
    student.freeze()
    choose = experts.top_indices
    teacher.keep_contexts()
    student.keep_contexts()
    data = [(state.canvas.tolist(), 0) for state in states]
    half = max(1, len(data) // 8)
    # Which experts are chosen has no gradient, and MLX wants to be told.
    with patch.object(experts, "top_indices", lambda *given: mx.stop_gradient(choose(*given))):
        dwq_quantize(
            student,
            lambda batch, number, split: teacher(batch),
            optimizers.Adam(learning_rate=rate, bias_correction=True),
            data[half:],
            data[:half],
            batch_size=1,
            max_seq_length=1 + len(states[0].canvas),
            seed=0,
            dtype=mx.float32,
        )
    return student.dense()


METHODS: dict[str, Callable[[Path, Sequence[State]], Dense]] = {
    "plain": plain,
    "gptq": gptq,
    "awq": awq,
    "dwq": dwq,
}


def learned(folder: Path, methods: Sequence[str], samples: int, kept: int) -> list[Figures]:
    """Each method's figures on states of prompts that it was not calibrated on."""
    states = {}
    for seed in (0, 1):
        prompts = [example.messages for example in demo_examples(samples, seed)]
        states[seed] = record(folder, prompts, seed, kept)
    rows = []
    with open_source(folder) as source:
        shapes = dense_shapes(source.config)
        plan = make_plan(
            source.config, source.raw_config, shapes, RECIPES["4bit"], dtype="bfloat16"
        )
        others = RECIPES["4bit"].with_rules([parse_rule("*.experts.*=16")])
        around = make_plan(source.config, source.raw_config, shapes, others, dtype="bfloat16")
        reference = Streamed(source.config, source.tensors, None, "float32")
        expected = reference.hidden(states[0], lambda: None)
        for name in methods:
            began = time.perf_counter()
            weights: dict[str, Tensor] = {
                key: Held(array) for key, array in METHODS[name](folder, states[1]).items()
            }
            seconds = time.perf_counter() - began
            candidate = Streamed(source.config, {**source.tensors, **weights}, around, "float32")
            found = candidate.hidden(states[0], lambda: None)
            row = compare(around, states[0], (reference, expected), (candidate, found))
            rows.append(
                replace(
                    row,
                    recipe=name,
                    total_size=plan.total_size,
                    bits_per_weight=plan.bits_per_weight,
                )
            )
            print(
                f"{name}: KL mean {row.kl_mean:.3e}, p99 {row.kl_p99:.3e}, same top-1 "
                f"{row.top1_converged:.4f}, calibrated in {seconds:.0f} s",
                flush=True,
            )
    print(f"{len(states[0])} states judged, {len(states[1])} states calibrated on")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo_path(), help="checkpoint folder")
    parser.add_argument("--learned", action="store_true", help="mlx-lm's methods, not the recipes")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this (repeatable)")
    parser.add_argument("--samples", type=int, default=4, help="prompts of each task")
    parser.add_argument("--steps", type=int, default=4, help="states of each block")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.learned:
        rows = learned(args.model, args.method or list(METHODS), args.samples, args.steps)
        found: Any = {row.recipe: row.__dict__ for row in rows}
    else:
        measured: Measurement = measure(
            args.model,
            list(RECIPES.values()),
            samples=args.samples,
            steps_kept=args.steps,
            convert=convert,
        )
        print(measured.table())
        found = measured.as_dict()
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
