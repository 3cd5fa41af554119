"""Random checkpoints from the parameter table alone: no torch, any layout, any quantization."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from configs import config as small_config

from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.packing import quantization_of
from mlx_dgemma.model.parameters import matrices, parameter_shapes

Tensors = dict[str, mx.array]


def write_plain(
    folder: Path,
    config: dict[str, Any] | None = None,
    layout: str = "mlx",
    change: Callable[[Tensors], None] | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> Path:
    """Write config.json and model.safetensors; `change` may edit the tensors before."""
    config = small_config() if config is None else config
    parsed = ModelConfig.from_dict(config)
    tensors = random_tensors(parsed, layout, dtype, seed)
    if change is not None:
        change(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    return folder


def random_tensors(
    config: ModelConfig, layout: str = "mlx", dtype: mx.Dtype = mx.float32, seed: int = 0
) -> Tensors:
    """Every tensor of the table: dense ones drawn, packed ones quantized from the same draw."""
    rng = np.random.default_rng(seed)
    table = parameter_shapes(config, layout)
    dense = {
        name: draw(rng, name, shape).astype(dtype)
        for name, (shape, _) in parameter_shapes(_without_quantization(config), layout).items()
    }
    tensors: Tensors = {}
    packable = matrices(config)
    for name in table:
        module, _, suffix = name.rpartition(".")
        if f"{module}.scales" not in table or module not in packable:
            tensors[name] = dense[name]
        elif suffix == "weight":
            packing = quantization_of(config.quantization, module)
            parts = mx.quantize(dense[name], packing.group_size, packing.bits, mode=packing.mode)
            for part, tensor in zip(("weight", "scales", "biases"), parts, strict=False):
                tensors[f"{module}.{part}"] = tensor
    return tensors


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> mx.array:
    if name.endswith("layer_scalar"):
        return mx.array(rng.uniform(0.4, 1.1, shape).astype(np.float32))
    if len(shape) == 1:
        return mx.array(rng.uniform(0.5, 1.5, shape).astype(np.float32))
    width = 1.0 if "router" in name or "embed_tokens" in name else shape[-1] ** -0.5
    return mx.array(rng.normal(0.0, width, shape).astype(np.float32))


def _without_quantization(config: ModelConfig) -> ModelConfig:
    return replace(config, quantization=None)
