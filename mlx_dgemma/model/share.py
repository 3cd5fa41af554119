"""What one of several processes holds of a model: heads, columns of the branches, vocabulary.

    attention     query heads by rank, and the key heads that these read; more ranks than key heads
                  hold the same key head
    branches      the inner width, of the dense branch and of every expert, in whole groups of the
                  packing: each rank computes a part of every expert that the router chose, so that
                  no shape depends on the routing
    vocabulary    whole slices of the head by rank; rank 0 holds the table whole, since it looks up
                  rows of it
    rank 0 alone  the vision tower, the self-conditioning's projections and the final norm

Norms and the router are everywhere. Where a width does not divide, the last ranks take more: rank 0
has the table and the vision tower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mlx_dgemma.errors import InputError
from mlx_dgemma.kernels.row_statistics import SLICE
from mlx_dgemma.model.config import ModelConfig, TextConfig
from mlx_dgemma.model.names import DECODER, EMBED_TOKENS, EMBED_VISION, VISION_TOWER
from mlx_dgemma.model.packing import quantization_of

Run = tuple[int, int]
MOST_RANKS = 64
_LEADERS = (f"{DECODER}self_conditioning.", f"{DECODER}norm.", VISION_TOWER, EMBED_VISION)
_LAYER = re.compile(re.escape(DECODER) + r"layers\.(\d+)\.(.+)")
_DENSE_UNIT = 32  # columns that kernels take at a time


@dataclass(frozen=True)
class Part:
    """Some rows or columns of matrices [..., rows, columns]: runs of a dense matrix' `of` many."""

    axis: Literal["rows", "columns"]
    runs: tuple[Run, ...]
    of: int

    def stored(self, size: int) -> tuple[Run, ...]:
        """The runs in a tensor that stores the axis in `size` numbers, as packed ones do."""
        return tuple((a * size // self.of, b * size // self.of) for a, b in self.runs)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part of a tensor of this shape."""
        axis = len(whole) - (2 if self.axis == "rows" else 1)
        size = sum(b - a for a, b in self.stored(whole[axis]))
        return (*whole[:axis], size, *whole[axis + 1 :])


@dataclass(frozen=True)
class Share:
    """Rank `rank` of `size` processes that hold one model."""

    rank: int
    size: int

    def check(self, config: ModelConfig) -> None:
        """InputError, which says how many machines are possible, where the model does not divide
        by this many."""
        why = _indivisible(config, self.size)
        if why is None:
            return
        possible = [str(n) for n in range(2, MOST_RANKS + 1) if _indivisible(config, n) is None]
        way = f"use {' or '.join(possible)}" if possible else "run it on one"
        raise InputError(f"This model cannot be shared by {self.size} machines, as {why}: {way}.")

    def config(self, config: ModelConfig) -> ModelConfig:
        """The config with the heads and widths of this rank's layers."""
        text = config.text
        local = replace(
            text,
            num_attention_heads=text.num_attention_heads // self.size,
            num_key_value_heads=max(1, text.num_key_value_heads // self.size),
            num_global_key_value_heads=max(1, text.num_global_key_value_heads // self.size),
            intermediate_size=_length(self._width(config, "mlp")),
            moe_intermediate_size=_length(self._width(config, "experts")),
        )
        vision = config.vision if self.rank == 0 else None
        return replace(config, text=local, vision=vision)

    def holds(self, name: str) -> bool:
        """Whether this rank has any of the tensor of this name."""
        return self.rank == 0 or not name.startswith(_LEADERS)

    def part(self, config: ModelConfig, name: str) -> Part | None:
        """What this rank holds of a module or one of its tensors; None where it holds it whole."""
        text = config.text
        if name.startswith(EMBED_TOKENS):
            runs = (self.vocabulary(text),)
            return None if self.rank == 0 else Part("rows", runs, text.vocab_size)
        found = _LAYER.match(name)
        if found is None:
            return None
        layer, module = int(found[1]), found[2]
        if module.startswith(("self_attn.q_norm", "self_attn.k_norm")):
            return None
        if module.startswith("self_attn."):
            return self._attention_part(text, layer, module.split(".")[1])
        if module.startswith("mlp."):
            run = self._width(config, "mlp")
            side: Literal["rows", "columns"] = "columns" if ".down_proj" in module else "rows"
            return Part(side, (run,), text.intermediate_size)
        if module.startswith("experts."):
            a, b = self._width(config, "experts")
            width = text.moe_intermediate_size
            if ".down_proj" in module:
                return Part("columns", ((a, b),), width)
            return Part("rows", ((a, b), (width + a, width + b)), 2 * width)
        return None

    def vocabulary(self, text: TextConfig) -> Run:
        """The ids whose logits this rank computes; it may be none."""
        first, last = bounds(-(-text.vocab_size // SLICE), self.size)[self.rank]
        return min(first * SLICE, text.vocab_size), min(last * SLICE, text.vocab_size)

    def _attention_part(self, text: TextConfig, layer: int, projection: str) -> Part:
        heads, kv_heads = text.num_attention_heads, text.kv_heads_of(layer)
        dim = text.head_dim_of(layer)
        own = heads // self.size
        if projection in ("q_proj", "o_proj"):
            run = (self.rank * own * dim, (self.rank + 1) * own * dim)
            return Part("columns" if projection == "o_proj" else "rows", (run,), heads * dim)
        first = self.rank * kv_heads // self.size
        count = max(1, kv_heads // self.size)
        return Part("rows", ((first * dim, (first + count) * dim),), kv_heads * dim)

    def _width(self, config: ModelConfig, branch: str) -> Run:
        width, unit = _branch(config, branch, self.size)
        first, last = bounds(width // unit, self.size)[self.rank]
        return first * unit, last * unit


def bounds(count: int, size: int) -> list[Run]:
    """`count` things dealt to `size` ranks in order; the last ranks get what does not divide."""
    each, more = divmod(count, size)
    ends = [each * (rank + 1) + max(0, rank + 1 - (size - more)) for rank in range(size)]
    return list(zip([0, *ends], ends, strict=False))


def _length(run: Run) -> int:
    return run[1] - run[0]


def _indivisible(config: ModelConfig, size: int) -> str | None:
    """Why a model does not divide by `size`; None where it does."""
    text = config.text
    heads = text.num_attention_heads
    if heads % size:
        return f"it has {heads} attention heads"
    for kv_heads in (text.num_key_value_heads, text.num_global_key_value_heads):
        if kv_heads % size and size % kv_heads:
            return f"{kv_heads} of its attention heads are for keys"
    for branch, what in (("mlp", "dense branch"), ("experts", "experts")):
        width, unit = _branch(config, branch, size)
        if width // unit < size or width % unit:
            return f"its {what} have an inner width of {width} in groups of {unit}"
    return None


def _branch(config: ModelConfig, branch: str, size: int) -> tuple[int, int]:
    """(inner width, the unit in which it is cut) of the dense branch or of the experts."""
    text = config.text
    width = text.intermediate_size if branch == "mlp" else text.moe_intermediate_size
    groups = set(_groups(config, branch, width))
    if groups:
        return width, math.lcm(*groups)
    unit = _DENSE_UNIT
    while unit > 1 and (width % unit or width // unit < size):
        unit //= 2
    return width, unit


def _groups(config: ModelConfig, branch: str, width: int) -> Iterable[int]:
    """The packings' group sizes along the inner width, of all layers."""
    for layer in range(config.text.num_hidden_layers):
        module = f"{DECODER}layers.{layer}.{branch}.down_proj"
        packing = quantization_of(config.quantization, module)
        if packing is not None and width % packing.group_size == 0:
            yield packing.group_size
