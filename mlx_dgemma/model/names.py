"""The parameter table: every tensor's name, shape and dtype, in both checkpoint layouts.

Attribute names of the network equal the MLX-community layout's tensor names. Hugging Face's
layout differs only in the experts (no `.weight`) and in what savers add: duplicates of tied
tensors, `lm_head.weight`, per-expert or split gate/up tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_dgemma.model.config import ModelConfig, TextConfig, VisionConfig

Layout = Literal["mlx", "hf"]
Shapes = dict[str, tuple[tuple[int, ...], str]]

DECODER = "model.decoder."
ENCODER_TEXT = "model.encoder.language_model."
VISION_TOWER = "model.encoder.vision_tower."
EMBED_VISION = "model.encoder.embed_vision."
EMBED_TOKENS = "model.decoder.embed_tokens"
LAYER_SCALAR = ".layer_scalar"


@dataclass(frozen=True)
class Quantization:
    """How one matrix is packed. `affine` has biases; the other modes do not."""

    group_size: int
    bits: int
    mode: str = "affine"

    def packed(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Suffix -> shape and dtype of the tensors that replace one dense matrix."""
        *rows, width = shape
        groups = (*rows, width // self.group_size)
        tensors = {"weight": ((*rows, width * self.bits // 32), "uint32")}
        tensors["scales"] = (groups, dtype if self.mode == "affine" else "uint8")
        if self.mode == "affine":
            tensors["biases"] = (groups, dtype)
        return tensors


def quantization_of(quantization: Mapping[str, Any] | None, module: str) -> Quantization | None:
    """What config.json says about one module; None where it leaves the module dense.

    An override without `mode` means affine, whatever the global mode is.
    """
    if quantization is None:
        return None
    override = quantization.get(module)
    if override is False:
        return None
    values = override if isinstance(override, Mapping) else quantization
    return Quantization(
        int(values["group_size"]), int(values["bits"]), values.get("mode") or "affine"
    )


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
    for name, shape, kind in _entries(config):
        module = name.removesuffix(".weight")
        packing = None
        if kind == "matrix" and layout == "mlx":
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
        for name, shape, kind in _entries(config)
        if kind == "matrix"
    }


def is_tied_duplicate(name: str) -> bool:
    """True for tensors some savers add although another one holds the same weights.

    The encoder shares every text weight with the decoder except its layer scalars, and the head
    is the embedding table.
    """
    if name in ("lm_head.weight", "model.lm_head.weight"):
        return True
    return name.startswith(ENCODER_TEXT) and not name.endswith(LAYER_SCALAR)


def tied_to(name: str) -> str:
    """The decoder's name for a tied duplicate."""
    if name.endswith("lm_head.weight"):
        return f"{EMBED_TOKENS}.weight"
    return DECODER + name.removeprefix(ENCODER_TEXT)


_Entry = tuple[str, tuple[int, ...], str]


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    text = config.text
    yield f"{EMBED_TOKENS}.weight", (text.vocab_size, text.hidden_size), "matrix"
    for index in range(text.num_hidden_layers):
        for name, shape, kind in _layer(text, index):
            yield f"{DECODER}layers.{index}.{name}", shape, kind
    yield f"{DECODER}norm.weight", (text.hidden_size,), "vector"
    for name, shape, kind in _self_conditioning(text):
        yield f"{DECODER}self_conditioning.{name}", shape, kind
    for index in range(text.num_hidden_layers):
        yield f"{ENCODER_TEXT}layers.{index}.layer_scalar", (1,), "vector"
    if config.vision is not None:
        for name, shape, kind in _vision(config.vision):
            yield VISION_TOWER + name, shape, kind
        projection = (text.hidden_size, config.vision.hidden_size)
        yield f"{EMBED_VISION}embedding_projection.weight", projection, "matrix"


def _layer(text: TextConfig, index: int) -> Iterator[_Entry]:
    hidden, wide = text.hidden_size, text.intermediate_size
    head_dim = text.head_dim_of(index)
    queries, keys = text.num_attention_heads * head_dim, text.kv_heads_of(index) * head_dim
    yield "self_attn.q_proj.weight", (queries, hidden), "matrix"
    yield "self_attn.k_proj.weight", (keys, hidden), "matrix"
    if text.is_sliding(index):
        yield "self_attn.v_proj.weight", (keys, hidden), "matrix"
    yield "self_attn.o_proj.weight", (hidden, queries), "matrix"
    yield "self_attn.q_norm.weight", (head_dim,), "vector"
    yield "self_attn.k_norm.weight", (head_dim,), "vector"
    yield "mlp.gate_proj.weight", (wide, hidden), "matrix"
    yield "mlp.up_proj.weight", (wide, hidden), "matrix"
    yield "mlp.down_proj.weight", (hidden, wide), "matrix"
    for norm in (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ):
        yield f"{norm}.weight", (hidden,), "vector"
    experts, expert_width = text.num_experts, text.moe_intermediate_size
    yield "router.proj.weight", (experts, hidden), "matrix"
    yield "router.scale", (hidden,), "vector"
    yield "router.per_expert_scale", (experts,), "vector"
    yield "experts.gate_up_proj.weight", (experts, 2 * expert_width, hidden), "matrix"
    yield "experts.down_proj.weight", (experts, hidden, expert_width), "matrix"
    for norm in (
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
        "pre_feedforward_layernorm_2",
    ):
        yield f"{norm}.weight", (hidden,), "vector"
    yield "layer_scalar", (1,), "vector"


def _self_conditioning(text: TextConfig) -> Iterator[_Entry]:
    hidden, wide = text.hidden_size, text.intermediate_size
    yield "pre_norm.weight", (hidden,), "vector"
    yield "gate_proj.weight", (wide, hidden), "matrix"
    yield "up_proj.weight", (wide, hidden), "matrix"
    yield "down_proj.weight", (hidden, wide), "matrix"


def _vision(vision: VisionConfig) -> Iterator[_Entry]:
    hidden, wide = vision.hidden_size, vision.intermediate_size
    pixels, positions = 3 * vision.patch_size**2, vision.position_embedding_size
    yield "patch_embedder.input_proj.weight", (hidden, pixels), "matrix"
    yield "patch_embedder.position_embedding_table", (2, positions, hidden), "vector"
    queries = vision.num_attention_heads * vision.head_dim
    keys = vision.num_key_value_heads * vision.head_dim
    for index in range(vision.num_hidden_layers):
        layer = f"encoder.layers.{index}"
        for name, shape in (
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
            ("self_attn.o_proj", (hidden, queries)),
        ):
            yield from _clippable(f"{layer}.{name}", shape, vision)
        yield f"{layer}.self_attn.q_norm.weight", (vision.head_dim,), "vector"
        yield f"{layer}.self_attn.k_norm.weight", (vision.head_dim,), "vector"
        for name, shape in (
            ("mlp.gate_proj", (wide, hidden)),
            ("mlp.up_proj", (wide, hidden)),
            ("mlp.down_proj", (hidden, wide)),
        ):
            yield from _clippable(f"{layer}.{name}", shape, vision)
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            yield f"{layer}.{norm}.weight", (hidden,), "vector"
    if vision.standardize:
        yield "std_bias", (hidden,), "vector"
        yield "std_scale", (hidden,), "vector"


def _clippable(name: str, shape: tuple[int, ...], vision: VisionConfig) -> Iterator[_Entry]:
    yield f"{name}.linear.weight", shape, "matrix"
    if vision.use_clipped_linears:
        for bound in ("input_min", "input_max", "output_min", "output_max"):
            yield f"{name}.{bound}", (), "vector"


def together(names: list[str]) -> str:
    """All the names in few words: those that differ in one number share a pattern, such as
    model.decoder.layers.{0-4,6}.layer_scalar."""
    found = [tuple(re.split(r"(?<=\.)(\d+)(?=\.)", name)) for name in names]
    for column in range(max(map(len, found)) - 2, 0, -2):
        alike: dict[tuple[str, ...], list[str]] = {}
        for parts in found:
            number = parts[column] if column < len(parts) else ""
            alike.setdefault(parts[:column] + parts[column + 1 :], []).append(number)
        found = [
            rest[:column] + ((_ranges(numbers),) if numbers[0] else ()) + rest[column:]
            for rest, numbers in alike.items()
        ]
    return ", ".join("".join(parts) for parts in found)


def _ranges(numbers: list[str]) -> str:
    """Numbers as {0-4,6}; one number as it is."""
    if len(numbers) == 1:
        return numbers[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs) + "}"
