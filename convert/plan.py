"""From a source's shapes and a recipe to the exact files that will be written.

No numbers are read: the plan gives every output tensor's name, dtype, shape and shard, the
config.json with its quantization block, and what the recipe could not do as asked.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mlx_dgemma.convert.recipes import Precision, Recipe, fit
from mlx_dgemma.convert.shards import SHARD_BYTES, Output, Shard, index_of, plan_shards
from mlx_dgemma.errors import InputError
from mlx_dgemma.headers import CODES
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.packing import Quantization
from mlx_dgemma.model.parameters import matrices

_LAYER = re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True)
class Step:
    """One source parameter and the tensors it becomes (weight first)."""

    name: str
    shape: tuple[int, ...]
    precision: Precision | None
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Plan:
    """Everything about the output that can be known before reading a weight."""

    recipe: str
    layout: str
    dtype: str
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    alternatives: tuple[str, ...]

    @property
    def total_size(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        return sum(prod(step.shape) for step in self.steps)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_size / self.parameters

    @property
    def index(self) -> dict[str, Any]:
        return index_of(list(self.shards))

    def fingerprint(self, source: Mapping[str, Any]) -> str:
        """Identifies this plan applied to this source; a resumed conversion must have the same."""
        shards = [
            [shard.filename, [[o.name, o.dtype, o.shape] for o in shard.outputs]]
            for shard in self.shards
        ]
        content = json.dumps([source, shards, self.config], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def make_plan(
    config: ModelConfig,
    raw_config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    *,
    dtype: str,
    layout: str = "mlx",
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Decide precision, names and shards for parameters `shapes` (in module-tree order).

    Raises InputError for a rule whose pattern matches no module that could be quantized.
    """
    quantizable = matrices(config)
    for rule in recipe.rules:
        if rule.must_match and not any(rule.matches(path) for path in quantizable):
            raise InputError(
                f"the rule {rule.pattern!r} matches no module; "
                "`mlx_dgemma.convert inspect` lists them."
            )
    steps: list[Step] = []
    chosen: dict[str, Precision] = {}
    alternatives: list[str] = []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        precision = None
        if module in quantizable:
            wanted = recipe.wanted(module, config.text.num_hidden_layers)
            if wanted is not None:
                precision, reason = fit(wanted, shape[-1])
                if reason is not None:
                    alternatives.append(f"{module}: {reason}")
        if precision is not None:
            chosen[module] = precision
        steps.append(Step(name, shape, precision, _outputs(name, shape, precision, dtype, layout)))
    outputs = [output for step in steps for output in step.outputs]
    target = published_dialect(raw_config, config)
    target["dtype"] = dtype
    for section in ("text_config", "vision_config"):
        if isinstance(target.get(section), dict) and "dtype" in target[section]:
            target[section]["dtype"] = dtype
    if chosen:
        block = quantization_block(recipe, chosen)
        target["quantization"] = block
        target["quantization_config"] = copy.deepcopy(block)
    return Plan(
        recipe=recipe.name,
        layout=layout,
        dtype=dtype,
        steps=tuple(steps),
        shards=tuple(plan_shards(outputs, shard_bytes)),
        config=target,
        alternatives=tuple(alternatives),
    )


def _outputs(
    name: str, shape: tuple[int, ...], precision: Precision | None, dtype: str, layout: str
) -> tuple[Output, ...]:
    module = name.removesuffix(".weight")
    if precision is None:
        stored = module if layout == "hf" and ".experts." in name else name
        return (Output(stored, CODES[dtype], shape),)
    packing = Quantization(precision.group_size, precision.bits, precision.mode)
    return tuple(
        Output(f"{module}.{suffix}", CODES[kind], packed)
        for suffix, (packed, kind) in packing.packed(shape, dtype).items()
    )


def quantization_block(recipe: Recipe, chosen: Mapping[str, Precision]) -> dict[str, Any]:
    """config.json's `quantization`: the recipe's default, and every module that differs."""
    default = recipe.default if recipe.default in chosen.values() else None
    default = default or next(iter(chosen.values()))
    block: dict[str, Any] = default.as_config(full=True)
    for module, precision in chosen.items():
        if precision != default:
            block[module] = precision.as_config(full=False)
    return block


def published_dialect(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """config.json in the dialect of the published checkpoints, without a quantization block.

    transformers 5 saves the full layers' shape as `per_layer_config` and renames the vision
    tower's rope type; mlx-vlm reads only the published spelling, transformers reads both.
    """
    target = copy.deepcopy(dict(raw))
    for key in ("quantization", "quantization_config", "torch_dtype"):
        target.pop(key, None)
    text = target["text_config"]
    if text.pop("per_layer_config", None) is not None:
        text["global_head_dim"] = config.text.global_head_dim
        text["num_global_key_value_heads"] = config.text.num_global_key_value_heads
        text["layer_types"] = list(config.text.layer_types)
    vision = target.get("vision_config")
    if isinstance(vision, dict):
        rope = vision.get("rope_parameters")
        if isinstance(rope, dict) and rope.get("rope_type") == "axial":
            rope["rope_type"] = "default"
    return target


def grouped(alternatives: Iterable[str]) -> list[str]:
    """The same remarks with those of many layers in one line."""
    counts = Counter(_LAYER.sub(".layers.N.", line) for line in alternatives)
    return [line if count == 1 else f"{line} ({count} times)" for line, count in counts.items()]
