"""Bytes of a model's weights, context and working memory, from its config alone.

weights        every tensor of the layout and precision at hand
context        keys and values of the committed tokens: full layers grow, sliding layers do not
working set    the most that one denoising step or one prefill chunk holds at once

Weights are exact. The context is exact for a prompt read at once; one that grows turn by turn may
hold up to 2,048 positions more in its full layers. The working set is an upper estimate from the
arrays the loop keeps alive at once; work sent ahead to a GPU may hold more, up to the limit that
`set_limits` sets. The peak really reached is reported with every generation.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.headers import read_header
from mlx_dgemma.kernels.row_statistics import SLICE as VOCABULARY_SLICE
from mlx_dgemma.model.attention import KEY_CHUNK, QUERY_BLOCK
from mlx_dgemma.model.config import ModelConfig, TextConfig
from mlx_dgemma.model.layer_context import STEP as CONTEXT_STEP
from mlx_dgemma.model.names import Layout
from mlx_dgemma.model.network import CHUNK as PREFILL_CHUNK
from mlx_dgemma.model.packed_context import GROUPS as PACKED_GROUPS
from mlx_dgemma.model.packed_context import STORED
from mlx_dgemma.model.parameters import parameter_shapes
from mlx_dgemma.model.share import Share

ITEM_SIZE = {"float32": 4, "uint32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}
SCORES_HELD = 3  # arrays of scores [heads, queries, keys] that are held at once
PACKED_SCALES = 2 * STORED.size  # bytes of a group's scale and bias


def weight_bytes(
    config: ModelConfig,
    *,
    quantization: dict[str, Any] | None = None,
    layout: Layout = "mlx",
    share: Share | None = None,
) -> int:
    """Bytes of all tensors, or of what a rank holds of them; `quantization` (config.json's block)
    replaces the config's own."""
    if quantization is not None:
        config = replace(config, quantization=quantization)
    total = 0
    for name, (shape, dtype) in parameter_shapes(config, layout).items():
        if share is not None:
            if not share.holds(name):
                continue
            part = share.part(config, name)
            shape = shape if part is None else part.shape(shape)
        total += prod(shape) * ITEM_SIZE[dtype]
    return total


def stored_bytes(folder: str | Path, *, widened: bool = False) -> int:
    """Bytes of the tensors in a checkpoint folder, from the headers of its safetensors files.

    widened: as a GPU holds them that computes in float32, with no float of 16 bits left.
    Raises CheckpointError when there are none or a header cannot be read.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files; download the checkpoint again.")
    entries = [entry for file in files for entry in read_header(file).entries.values()]
    narrow = ("bfloat16", "float16") if widened else ()
    return sum(entry.nbytes * (2 if entry.dtype in narrow else 1) for entry in entries)


def context_bytes(config: ModelConfig, tokens: int, kv_bits: int | None = None) -> int:
    """Bytes of the context cache once it holds `tokens`, a canvas after them included.

    kv_bits: 8 for the layers that grow in 8 bits.
    """
    text, room = config.text, config.canvas_length
    total = 0
    for layer in range(text.num_hidden_layers):
        window = text.window_of(layer)
        kept = tokens if window is None else min(tokens, window - 1)
        slots = -(-(kept + 2 * room) // CONTEXT_STEP) * CONTEXT_STEP
        total += slots * _position_bytes(text, layer, kv_bits)
    return total


def token_bytes(text: TextConfig, kv_bits: int | None) -> int:
    """Bytes that each token adds to a context that is longer than the sliding window."""
    return sum(
        _position_bytes(text, layer, kv_bits)
        for layer in range(text.num_hidden_layers)
        if text.window_of(layer) is None
    )


def _position_bytes(text: TextConfig, layer: int, kv_bits: int | None) -> int:
    """Bytes of one position's keys and values in a layer."""
    size = key_bytes(text, layer, ITEM_SIZE[text.dtype], kv_bits)
    return 2 * text.kv_heads_of(layer) * size


def key_bytes(text: TextConfig, layer: int, item_size: int, kv_bits: int | None = None) -> int:
    """Bytes that a committed position's key, or value, takes in one head of a layer."""
    head_dim = text.head_dim_of(layer)
    if kv_bits is None or text.window_of(layer) is not None:
        return head_dim * item_size
    group = next(size for size in PACKED_GROUPS if head_dim % size == 0)
    return head_dim * kv_bits // 8 + head_dim // group * PACKED_SCALES


def working_bytes(
    config: ModelConfig,
    tokens: int,
    canvases: int = 1,
    *,
    sliced_head: bool = False,
    kv_bits: int | None = None,
) -> int:
    """An upper estimate of what a denoising step or a prefill chunk adds to weights and context.

    A step holds the raw logits, or a slice of them, and while statistics are taken one float32
    array of their size. When that is gone the tokens of a sparse signal come, at most a sixteenth
    of it; so do the first layers of the next step, which need no more than these. Presets that
    leave positions out keep every layer's keys and values of the canvas from step to step. The
    widest layer needs its experts' rows and the attention scores over the context. Of a context in
    8 bits, one chunk of keys and values is whole at a time.
    """
    text = config.text
    rows = canvases * config.canvas_length
    columns = min(text.vocab_size, VOCABULARY_SLICE) if sliced_head else text.vocab_size
    logits = rows * columns * (ITEM_SIZE[text.dtype] + 4)
    kept = rows * sum(_position_bytes(text, i, None) for i in range(text.num_hidden_layers))
    step = logits + kept + _layer_bytes(text, rows, rows, tokens)
    unpacked = 0
    if kv_bits is not None:
        width = max(text.kv_heads_of(i) * text.head_dim_of(i) for i in _full_layers(text))
        # As they leave the packing, and in the dtype of the activations.
        unpacked = 2 * min(tokens, KEY_CHUNK) * width * 2 * ITEM_SIZE[text.dtype]
    return max(step, _layer_bytes(text, PREFILL_CHUNK, QUERY_BLOCK, tokens)) + unpacked


def _full_layers(text: TextConfig) -> list[int]:
    return [i for i in range(text.num_hidden_layers) if text.window_of(i) is None]


def packable(text: TextConfig) -> bool:
    """Whether the context of this model can be kept in 8 bits."""
    return all(text.head_dim_of(i) % PACKED_GROUPS[-1] == 0 for i in _full_layers(text))


def _layer_bytes(text: TextConfig, rows: int, queries: int, tokens: int) -> int:
    """Activations of the widest layer for `rows` tokens, `queries` of them attending at a time to
    `tokens` others."""
    routed = rows * text.top_k_experts
    experts = routed * (2 * text.hidden_size + 3 * text.moe_intermediate_size)
    scores = text.num_attention_heads * queries * min(tokens + rows, KEY_CHUNK)
    residual = rows * text.hidden_size * 8
    return (experts + residual) * ITEM_SIZE[text.dtype] + SCORES_HELD * scores * 4
