"""The shapes in which a model will ask for the fused operations, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_dgemma.kernels.accept import OPERATION as ACCEPT
from mlx_dgemma.kernels.attention import OPERATION as ATTENTION
from mlx_dgemma.kernels.dispatch import ROW_CLASSES
from mlx_dgemma.kernels.fused_attention import OPERATION as FUSED_ATTENTION
from mlx_dgemma.kernels.matrix import DENSE
from mlx_dgemma.kernels.moe import COMBINE
from mlx_dgemma.kernels.moe import OPERATION as MOE
from mlx_dgemma.kernels.qkv import OPERATION as NORMED_HEADS
from mlx_dgemma.kernels.registry import Operation, Size
from mlx_dgemma.kernels.residual import ATTENDED, BRANCHES
from mlx_dgemma.kernels.router import OPERATION as ROUTER
from mlx_dgemma.kernels.row_statistics import OPERATION as ROW_STATISTICS
from mlx_dgemma.kernels.self_checks import Request
from mlx_dgemma.kernels.sparse_embeddings import CAPACITY, GATHER, SELECT
from mlx_dgemma.model.attention import KEY_CHUNK, QUERY_BLOCK
from mlx_dgemma.model.config import ModelConfig, TextConfig
from mlx_dgemma.model.names import DECODER, EMBED_TOKENS
from mlx_dgemma.model.packing import quantization_of


def kernel_shapes(config: ModelConfig, dtype: str | None = None) -> list[Request]:
    """Every operation at every shape that its first prompts and blocks will have.

    dtype: of the activations; None is the config's. Prompts end anywhere, so all counts of tokens
    that have a verdict of their own are among them; a batch of canvases has more rows than these,
    and is checked when it comes.
    """
    asked = _vocabulary(config, dtype or config.text.dtype)
    requests = [Request(operation, operation.shape(*sizes)) for operation, *sizes in asked]
    asked = _layers(config, dtype or config.text.dtype)
    requests += [Request(operation, operation.shape(*sizes)) for operation, *sizes in asked]
    asked = _pictures(config, dtype or config.text.dtype)
    requests += [Request(operation, operation.shape(*sizes)) for operation, *sizes in asked]
    return requests


Calls = Iterator[tuple[Operation, *tuple[Size, ...]]]


def _vocabulary(config: ModelConfig, dtype: str) -> Calls:
    """What a step asks once."""
    text, length = config.text, config.canvas_length
    table = _packing(config, EMBED_TOKENS, text.hidden_size)
    yield ACCEPT, "float32", length
    # A step may predict a part of the canvas only.
    for rows in sorted({length, *(most for most in ROW_CLASSES["rows"] if most < length)}):
        yield ROW_STATISTICS, dtype, rows, text.vocab_size
        yield SELECT, dtype, dtype, rows, text.vocab_size, CAPACITY
        yield GATHER, dtype, table, text.hidden_size, rows, CAPACITY


def _layers(config: ModelConfig, dtype: str) -> Calls:
    """What every layer asks."""
    text = config.text
    stream = "float32" if dtype == "float16" else dtype  # see Model
    for tokens in sorted({config.canvas_length, *ROW_CLASSES["tokens"]}):
        yield ATTENDED, stream, dtype, tokens, text.hidden_size
        yield BRANCHES, stream, dtype, tokens, text.hidden_size
        yield COMBINE, dtype, tokens, text.hidden_size, text.top_k_experts
        yield ROUTER, dtype, tokens, text.num_experts, text.top_k_experts
        for gate_up, down in sorted(_experts(config)):
            widths = (text.hidden_size, text.moe_intermediate_size)
            yield MOE, dtype, tokens, *widths, text.num_experts, text.top_k_experts, gate_up, down
    for head_dim, kv_heads in sorted(_kinds(text)):
        for length in sorted({config.canvas_length, *ROW_CLASSES["length"]}):
            yield NORMED_HEADS, dtype, length, text.num_attention_heads, head_dim, 1
            yield NORMED_HEADS, dtype, length, kv_heads, head_dim, 1
            yield NORMED_HEADS, dtype, length, kv_heads, head_dim, 0
            if length <= max(QUERY_BLOCK, config.canvas_length):
                heads = (text.num_attention_heads, kv_heads, head_dim)
                yield ATTENTION, dtype, length, *heads, KEY_CHUNK


def _pictures(config: ModelConfig, dtype: str) -> Calls:
    """What the vision tower asks."""
    vision = config.vision
    if vision is not None and vision.num_attention_heads == vision.num_key_value_heads:
        for patches in ROW_CLASSES["patches"]:
            yield FUSED_ATTENTION, dtype, patches, vision.num_attention_heads, vision.head_dim


def _kinds(text: TextConfig) -> set[tuple[int, int]]:
    """(head_dim, kv_heads) of the layers."""
    layers = range(text.num_hidden_layers)
    return {(text.head_dim_of(index), text.kv_heads_of(index)) for index in layers}


def _experts(config: ModelConfig) -> set[tuple[str, str]]:
    """(gate_up, down): how the layers' experts are packed."""
    text, found = config.text, set()
    for index in range(text.num_hidden_layers):
        experts = f"{DECODER}layers.{index}.experts."
        gate_up = _packing(config, experts + "gate_up_proj", text.hidden_size)
        found.add((gate_up, _packing(config, experts + "down_proj", text.moe_intermediate_size)))
    return found


def _packing(config: ModelConfig, module: str, columns: int) -> str:
    packing = quantization_of(config.quantization, module)
    if packing is None or columns % packing.group_size:
        return DENSE
    return f"{packing.mode} {packing.bits}/{packing.group_size}"
