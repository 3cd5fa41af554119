"""The parameter table: every tensor's shape and dtype, in both checkpoint layouts, as the network's
own modules declare them."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from mlx_dgemma.model.backbone import Backbone
from mlx_dgemma.model.config import ModelConfig, TextConfig, VisionConfig
from mlx_dgemma.model.layers import Weights
from mlx_dgemma.model.names import VISION_TOWER, Layout, named_tensors
from mlx_dgemma.model.packing import quantization_of

Shapes = dict[str, tuple[tuple[int, ...], str]]


class _Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    is_matrix: bool  # may be packed


def parameter_shapes(
    config: ModelConfig, layout: Layout = "mlx", scaled: Collection[str] | None = None
) -> Shapes:
    """Name -> (shape, dtype name) of every tensor, in module-tree order.

    layout: "mlx" writes `experts.gate_up_proj.weight`, "hf" `experts.gate_up_proj`.
    scaled: the modules that are quantized; by default all that the config's quantization covers
        and whose width it divides, except the vision tower.
    """
    dtype = config.text.dtype
    table: Shapes = {}
    for name, shape, is_matrix in _entries(config.text, config.vision):
        module = name.removesuffix(".weight")
        packing = None
        if is_matrix and layout == "mlx":
            packing = quantization_of(config.quantization, module)
        if packing is not None and scaled is None:
            fits = shape[-1] % packing.group_size == 0
            packing = packing if fits and not name.startswith(VISION_TOWER) else None
        elif packing is not None and module not in (scaled or ()):
            packing = None
        if packing is not None:
            for suffix, entry in packing.packed(shape, dtype).items():
                table[f"{module}.{suffix}"] = entry
        elif layout == "hf" and ".experts." in name:
            table[module] = (shape, dtype)
        else:
            table[name] = (shape, dtype)
    return table


def matrices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Module name -> dense shape of everything a quantizer may pack."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape, is_matrix in _entries(config.text, config.vision)
        if is_matrix
    }


@lru_cache(maxsize=4)
def _entries(text: TextConfig, vision: VisionConfig | None) -> tuple[_Entry, ...]:
    backbone = Backbone(text, vision, mx.float32)
    packable = {name for name, module in backbone.named_modules() if isinstance(module, Weights)}
    return tuple(
        _Entry(f"model.{name}", tuple(tensor.shape), name.removesuffix(".weight") in packable)
        for name, tensor in named_tensors(backbone.parameters()).items()
    )
