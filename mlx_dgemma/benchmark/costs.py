"""What one pass costs, counted from the shapes: multiplications and the bytes that must move.

Operations are two per multiply-add of matrix products, attention and the vocabulary; elementwise
work is left out. Bytes are the weights as they are stored, the context, and the arrays as long as
the vocabulary, each touched as often as the fused operations touch it; activations inside a layer
are left out. So both are lower bounds, and a time from them is a floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from mlx_dgemma.benchmark.chips import Chip
from mlx_dgemma.checkpoint.sizes import ITEM_SIZE, key_bytes
from mlx_dgemma.model import Model
from mlx_dgemma.model.config import ModelConfig, TextConfig
from mlx_dgemma.model.names import named_tensors
from mlx_dgemma.model.parameters import parameter_shapes

Conditioning = Literal["none", "dense", "sparse"]


@dataclass(frozen=True)
class Cost:
    """Work of one kind in one pass."""

    flops: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.nbytes + other.nbytes)

    def record(self) -> dict[str, float]:
        return {"flops": self.flops, "bytes": self.nbytes}


def step_costs(
    config: ModelConfig,
    context_tokens: int,
    *,
    canvases: int = 1,
    positions: int | None = None,
    tile: int = 1,
    conditioning: Conditioning = "dense",
    item_size: int | None = None,
    stored: Mapping[str, int] | None = None,
    kv_bits: int | None = None,
) -> dict[str, Cost]:
    """Component -> cost of one denoising step, the sampler with it.

    positions: of each canvas that the step computes; None is all. tile: rows that an expert's
        products come in, so that it multiplies as if it had a multiple of them: MLX's kernels 16,
        ours 8. With 1, rows are only counted.
    conditioning: "none" on a block's first step; "sparse" once few tokens carry the probability,
        where the table's part is too small to count. item_size: bytes of an activation. stored:
        bytes of the weights by component, by default in the precision that the config names.
        kv_bits: 8 for a context in 8 bits.
    """
    text = config.text
    rows = canvases * (config.canvas_length if positions is None else positions)
    size = ITEM_SIZE[text.dtype] if item_size is None else item_size
    stored = stored_bytes(config) if stored is None else stored
    costs = _layer_costs(config, rows, context_tokens, size, stored, kv_bits=kv_bits, tile=tile)
    logits = rows * text.vocab_size
    product = 2.0 * logits * text.hidden_size
    costs["head"] = Cost(product, stored["table"] + logits * size)
    own = Cost()
    if conditioning != "none":
        mlp = 6.0 * rows * text.hidden_size * text.intermediate_size
        own = Cost(mlp, stored["self-conditioning"])
    if conditioning == "dense":
        own += Cost(product, stored["table"] + logits * size)
    elif conditioning == "sparse":
        own += Cost(0.0, logits * size)
    costs["self-conditioning"] = own
    costs["sampler"] = Cost(0.0, logits * size)
    return costs


def prefill_costs(
    config: ModelConfig,
    tokens: int,
    context_tokens: int = 0,
    *,
    item_size: int | None = None,
    stored: Mapping[str, int] | None = None,
    kv_bits: int | None = None,
) -> dict[str, Cost]:
    """Component -> cost of one encoder pass over `tokens` after `context_tokens`.

    The last layer only makes keys and values; counted as a whole layer, which is a little much.
    """
    size = ITEM_SIZE[config.text.dtype] if item_size is None else item_size
    stored = stored_bytes(config) if stored is None else stored
    return _layer_costs(config, tokens, context_tokens, size, stored, causal=True, kv_bits=kv_bits)


def total(costs: dict[str, Cost]) -> Cost:
    return sum(costs.values(), Cost())


def floor_seconds(costs: dict[str, Cost], chip: Chip) -> float:
    """The least time: each component after the other, arithmetic and memory overlapping in it."""
    return sum(chip.seconds(cost.flops, cost.nbytes) for cost in costs.values())


def stored_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes of the weights by component, in the precision the config names."""
    shapes = parameter_shapes(config).items()
    return _summed({name: prod(shape) * ITEM_SIZE[dtype] for name, (shape, dtype) in shapes})


def loaded_bytes(model: Model) -> dict[str, int]:
    """Bytes of the weights by component, as they lie in memory."""
    tensors = named_tensors(model.model.decoder.parameters()).items()
    return _summed({f"decoder.{name}": tensor.nbytes for name, tensor in tensors})


def _layer_costs(
    config: ModelConfig,
    rows: int,
    context_tokens: int,
    size: int,
    stored: Mapping[str, int],
    *,
    causal: bool = False,
    kv_bits: int | None = None,
    tile: int = 1,
) -> dict[str, Cost]:
    text = config.text
    projections = mixing = kv_bytes = 0.0
    for layer in range(text.num_hidden_layers):
        heads, dim = text.num_attention_heads, text.head_dim_of(layer)
        kv_heads, window = text.kv_heads_of(layer), text.window_of(layer)
        parts = 2 if window is None else 3  # a full layer has no values of its own
        width = heads * dim * 2 + (parts - 1) * kv_heads * dim
        projections += 2.0 * rows * text.hidden_size * width
        before = float(context_tokens if window is None else min(context_tokens, window - 1))
        own = rows / 2 if causal else config.canvas_length
        if causal and window is not None:
            before, own = min(before + own, window), 0.0
        mixing += 4.0 * rows * (before + own) * heads * dim
        kept = key_bytes(text, layer, size, kv_bits)  # of what is committed, in one head
        kv_bytes += 2.0 * kv_heads * (before * kept + own * dim * size)
    layers = text.num_hidden_layers
    routed = text.num_experts * expert_rows(text, rows, tile)
    touched = 1.0 - (1.0 - text.top_k_experts / text.num_experts) ** rows
    expert = 6.0 * routed * text.hidden_size * text.moe_intermediate_size
    return {
        "attention": Cost(projections + mixing, stored["attention"] + kv_bytes),
        "dense": Cost(
            6.0 * layers * rows * text.hidden_size * text.intermediate_size, stored["dense"]
        ),
        "router": Cost(2.0 * layers * rows * text.hidden_size * text.num_experts, stored["router"]),
        "experts": Cost(layers * expert, touched * stored["experts"]),
    }


def expert_rows(text: TextConfig, rows: int, tile: int) -> float:
    """Rows that an expert multiplies on average when `rows` positions are routed evenly, each
    expert's share rounded up to whole tiles: of few rows, most of a tile is empty."""
    share = text.top_k_experts / text.num_experts
    if tile == 1:
        return rows * share
    if share == 1:
        return float(-(-rows // tile) * tile)
    chance, mean = (1.0 - share) ** rows, 0.0
    for count in range(rows + 1):  # of a binomial distribution
        mean += chance * (-(-count // tile) * tile)
        chance *= (rows - count) / (count + 1) * share / (1.0 - share)
    return mean


def _summed(sizes: Mapping[str, int]) -> dict[str, int]:
    found = dict.fromkeys(
        ("attention", "dense", "router", "experts", "table", "self-conditioning"), 0
    )
    for name, size in sizes.items():
        kind = _kind(name)
        if kind is not None:
            found[kind] += size
    return found


def _kind(name: str) -> str | None:
    for part, kind in (
        ("vision_tower.", None),
        (".self_attn.", "attention"),
        (".mlp.", "dense"),
        (".router.", "router"),
        (".experts.", "experts"),
        ("decoder.embed_tokens.", "table"),
        (".self_conditioning.", "self-conditioning"),
    ):
        if part in name:
            return kind
    return None
