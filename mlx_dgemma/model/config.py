"""The checkpoint's configuration: frozen, checked, and the same for both dialects of config.json.

The published dialect writes `global_head_dim` and `num_global_key_value_heads`; what
transformers saves writes `per_layer_config` instead. Values the network cannot honour are
refused here, in one sentence that names file, key and value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_dgemma.errors import CheckpointError, ModelNotFoundError
from mlx_dgemma.files import read_json
from mlx_dgemma.model.generation_config import GenerationConfig, generation_of
from mlx_dgemma.model.section import Section

SLIDING = "sliding_attention"
FULL = "full_attention"
MODEL_TYPE = "diffusion_gemma"
ACTIVATION = "gelu_pytorch_tanh"
DTYPES = ("float16", "bfloat16", "float32")
# What no network of this kind reaches, and what memory still holds when a file says so.
MOST_LAYERS = 1024
MOST_WIDTH = 1 << 20
MOST_CANVAS = 1 << 14


@dataclass(frozen=True)
class TextConfig:
    """Shapes and constants of the network that both passes share."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_global_key_value_heads: int
    global_head_dim: int
    layer_types: tuple[str, ...]
    sliding_window: int
    sliding_rope_theta: float = 10_000.0
    full_rope_theta: float = 1_000_000.0
    full_partial_rotary_factor: float = 0.25
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0
    max_position_embeddings: int = 131_072
    pad_token_id: int = 0
    bos_token_id: int = 2
    bidirectional_images: bool = True
    dtype: str = "bfloat16"

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    def is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING

    def window_of(self, layer: int) -> int | None:
        """Keys a query of this layer sees, itself included; None without a limit."""
        return self.sliding_window if self.is_sliding(layer) else None

    def head_dim_of(self, layer: int) -> int:
        return self.head_dim if self.is_sliding(layer) else self.global_head_dim

    def kv_heads_of(self, layer: int) -> int:
        return (
            self.num_key_value_heads if self.is_sliding(layer) else self.num_global_key_value_heads
        )

    @classmethod
    def from_section(cls, text: Section, dtype: str | None = None) -> TextConfig:
        text.only("tie_word_embeddings", (True,), True)
        text.only("attention_bias", (False,), False)
        text.only("hidden_activation", (ACTIVATION,), ACTIVATION)
        images = text.only("use_bidirectional_attention", ("vision", None), None)
        layer_types = _layer_types(text)
        global_head_dim, global_kv_heads = _full_attention_heads(text, layer_types)
        sliding, full, partial = _rope(text)
        config = cls(
            vocab_size=text.integer("vocab_size"),
            hidden_size=_width(text, "hidden_size"),
            intermediate_size=_width(text, "intermediate_size"),
            moe_intermediate_size=_width(text, "moe_intermediate_size"),
            num_experts=_width(text, "num_experts"),
            top_k_experts=_width(text, "top_k_experts"),
            num_attention_heads=_width(text, "num_attention_heads"),
            num_key_value_heads=_width(text, "num_key_value_heads"),
            head_dim=_width(text, "head_dim"),
            num_global_key_value_heads=global_kv_heads,
            global_head_dim=global_head_dim,
            layer_types=layer_types,
            sliding_window=text.integer("sliding_window"),
            sliding_rope_theta=sliding,
            full_rope_theta=full,
            full_partial_rotary_factor=partial,
            rms_norm_eps=text.number("rms_norm_eps", 1e-6),
            final_logit_softcapping=text.positive("final_logit_softcapping", 30.0),
            max_position_embeddings=text.integer("max_position_embeddings", 131_072),
            pad_token_id=text.integer("pad_token_id", 0, minimum=0),
            bos_token_id=text.integer("bos_token_id", 2, minimum=0),
            bidirectional_images=images == "vision",
            dtype=dtype or text.only("dtype", DTYPES, "bfloat16"),
        )
        config._check(text)
        return config

    def _check(self, text: Section) -> None:
        heads = self.num_attention_heads
        if self.top_k_experts > self.num_experts:
            raise text.refuse(
                "top_k_experts", f"exceeds {text.prefix}num_experts = {self.num_experts}"
            )
        if heads % self.num_key_value_heads:
            raise text.refuse("num_key_value_heads", f"must divide num_attention_heads = {heads}")
        if heads % self.num_global_key_value_heads:
            raise CheckpointError(
                f"{text.source}: {text.prefix}num_global_key_value_heads = "
                f"{self.num_global_key_value_heads} must divide num_attention_heads = {heads}."
            )
        for key, dim in (("head_dim", self.head_dim), ("global_head_dim", self.global_head_dim)):
            if dim % 2:
                raise CheckpointError(f"{text.source}: {text.prefix}{key} = {dim} must be even.")


def _width(section: Section, key: str, default: int | None = None) -> int:
    """A width of a matrix, or a count along one; required without a default."""
    if default is not None and section.get(key) is None:
        return default
    return section.integer(key, maximum=MOST_WIDTH)


def _layer_types(text: Section) -> tuple[str, ...]:
    count = text.integer("num_hidden_layers", maximum=MOST_LAYERS)
    listed = text.get("layer_types")
    if listed is None:  # five sliding layers, then a full one; the last is always full
        listed = [SLIDING if (i + 1) % 6 and i + 1 < count else FULL for i in range(count)]
    if not isinstance(listed, list) or any(kind not in (SLIDING, FULL) for kind in listed):
        raise text.refuse("layer_types", f'must be a list of "{SLIDING}" and "{FULL}"')
    if len(listed) != count:
        raise text.refuse("layer_types", f"must have num_hidden_layers = {count} entries")
    if listed[-1] != FULL:
        raise text.refuse("layer_types", f'must end with "{FULL}"')
    return tuple(listed)


def _full_attention_heads(text: Section, layer_types: tuple[str, ...]) -> tuple[int, int]:
    """(head_dim, key-value heads) of the full layers, from whichever dialect is written."""
    shared = _width(text, "num_key_value_heads")
    head_dim = _width(text, "global_head_dim", 512)
    kv_heads = _width(text, "num_global_key_value_heads", shared)
    if text.get("per_layer_config") is None:
        return head_dim, kv_heads

    layers = text.section("per_layer_config")
    found: set[tuple[int, int]] = set()
    written = {_layer_index(layers, key, len(layer_types)): key for key in layers.values}
    for index, kind in enumerate(layer_types):
        entry = layers.section(written[index]) if index in written else None
        own_dim = _width(text, "head_dim")
        if entry is not None:
            own = (
                _width(entry, "head_dim", own_dim),
                _width(entry, "num_key_value_heads", shared),
            )
        else:
            own = (own_dim, shared)
        if kind == FULL:
            found.add(own)
        elif own != (own_dim, shared):
            raise layers.refuse(
                written[index], "differs from the other sliding layers, which is not supported"
            )
    if len(found) != 1:
        raise text.refuse("per_layer_config", "gives the full-attention layers different shapes")
    result = found.pop()
    for key, value in zip(("global_head_dim", "num_global_key_value_heads"), result, strict=True):
        if text.get(key) not in (None, value):
            raise text.refuse(key, f"contradicts per_layer_config, which says {value}")
    return result


def _layer_index(layers: Section, key: str, count: int) -> int:
    if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= count:
        raise layers.refuse(key, f"names no layer; this model has {count}")
    return int(key)


def _rope(text: Section) -> tuple[float, float, float]:
    """(sliding theta, full theta, full partial rotary factor)."""
    if text.get("rope_parameters") is None:
        return 10_000.0, 1_000_000.0, 0.25
    kinds = text.section("rope_parameters")
    sliding, full = kinds.section(SLIDING), kinds.section(FULL)
    sliding.only("rope_type", ("default",), "default")
    full.only("rope_type", ("proportional",), "proportional")
    sliding.only("partial_rotary_factor", (1.0,), 1.0)
    for kind in (sliding, full):
        kind.only("factor", (1.0,), 1.0)
    partial = full.number("partial_rotary_factor", 1.0)
    if partial > 1.0:
        raise full.refuse("partial_rotary_factor", "must be at most 1")
    return sliding.positive("rope_theta"), full.positive("rope_theta"), partial


@dataclass(frozen=True)
class VisionConfig:
    """The Gemma 4 vision tower."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int = 16
    pooling_kernel_size: int = 3
    position_embedding_size: int = 10_240
    rope_theta: float = 100.0
    rms_norm_eps: float = 1e-6
    standardize: bool = False
    use_clipped_linears: bool = False

    @classmethod
    def from_section(cls, vision: Section) -> VisionConfig:
        vision.only("model_type", ("gemma4_vision",), "gemma4_vision")
        vision.only("attention_bias", (False,), False)
        vision.only("hidden_activation", (ACTIVATION,), ACTIVATION)
        theta = 100.0
        if vision.get("rope_parameters") is not None:
            rope = vision.section("rope_parameters")
            # transformers renames the published "default" to "axial" when it saves.
            rope.only("rope_type", ("axial", "default"), "axial")
            rope.only("factor", (1.0,), 1.0)
            theta = rope.positive("rope_theta", 100.0)
        config = cls(
            hidden_size=_width(vision, "hidden_size"),
            intermediate_size=_width(vision, "intermediate_size"),
            num_hidden_layers=vision.integer("num_hidden_layers", maximum=MOST_LAYERS),
            num_attention_heads=_width(vision, "num_attention_heads"),
            num_key_value_heads=_width(vision, "num_key_value_heads"),
            head_dim=_width(vision, "head_dim"),
            patch_size=vision.integer("patch_size", 16, maximum=1024),
            pooling_kernel_size=vision.integer("pooling_kernel_size", 3, maximum=1024),
            position_embedding_size=vision.integer("position_embedding_size", 10_240),
            rope_theta=theta,
            rms_norm_eps=vision.number("rms_norm_eps", 1e-6),
            standardize=vision.flag("standardize", False),
            use_clipped_linears=vision.flag("use_clipped_linears", False),
        )
        if config.head_dim % 4:
            raise vision.refuse("head_dim", "must be a multiple of 4, two rotary halves")
        if config.num_attention_heads % config.num_key_value_heads:
            raise vision.refuse("num_key_value_heads", "must divide num_attention_heads")
        return config


@dataclass(frozen=True)
class ModelConfig:
    """Everything config.json and generation_config.json say about one checkpoint."""

    text: TextConfig
    vision: VisionConfig | None = None
    canvas_length: int = 256
    image_token_id: int = 258_880
    boi_token_id: int = 255_999
    eoi_token_id: int = 258_882
    vision_soft_tokens_per_image: int = 280
    quantization: dict[str, Any] | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    processor: dict[str, Any] = field(default_factory=dict)  # read by prompt/patches.py

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer wherever they stand in a committed canvas."""
        return frozenset(self.generation.eos_token_id)

    @classmethod
    def from_dict(
        cls,
        config: Mapping[str, Any],
        *,
        source: str = "config.json",
        generation: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """Check and freeze a parsed config.json.

        generation: a parsed generation_config.json, which takes precedence over the one nested
            in config.json. Raises CheckpointError on a missing, contradictory or unsupported
            value.
        """
        top = Section(config, source)
        if top.get("model_type") != MODEL_TYPE:
            raise top.refuse("model_type", f'is not a DiffusionGemma; expected "{MODEL_TYPE}"')
        top.only("tie_word_embeddings", (True,), True)
        key = "dtype" if top.get("dtype") is not None else "torch_dtype"
        dtype = top.only(key, (*DTYPES, None), None)
        text = TextConfig.from_section(top.section("text_config"), dtype)
        vision = None
        if top.get("vision_config") is not None:
            vision = VisionConfig.from_section(top.section("vision_config"))
        return cls(
            text=text,
            vision=vision,
            canvas_length=top.integer("canvas_length", 256, maximum=MOST_CANVAS),
            image_token_id=top.integer("image_token_id", 258_880, minimum=0),
            boi_token_id=top.integer("boi_token_id", 255_999, minimum=0),
            eoi_token_id=top.integer("eoi_token_id", 258_882, minimum=0),
            vision_soft_tokens_per_image=top.integer("vision_soft_tokens_per_image", 280),
            quantization=_quantization(top),
            generation=generation_of(top, generation),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read config.json and, where present, the generation and processor configs."""
        folder = Path(folder)
        if not os.path.isdir(folder):
            raise ModelNotFoundError(f"There is no folder {folder}; check the model's path.")
        path = folder / "config.json"
        if not os.path.exists(path):
            raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder.")
        generation = folder / "generation_config.json"
        own_file = read_json(generation) if os.path.exists(generation) else None
        config = cls.from_dict(read_json(path), source=str(path), generation=own_file)
        for name in ("processor_config.json", "preprocessor_config.json"):
            if os.path.exists(folder / name):
                return replace(config, processor=read_json(folder / name))
        return config


def _quantization(top: Section) -> dict[str, Any] | None:
    """The `quantization` object (older files: `quantization_config`), checked."""
    key = "quantization" if top.get("quantization") is not None else "quantization_config"
    if top.get(key) is None:
        return None
    section = top.section(key)
    if "quant_method" in section.values:
        raise section.refuse("quant_method", "is not an MLX quantization; convert the checkpoint")
    section.integer("bits")
    section.integer("group_size")
    section.only("mode", ("affine", "mxfp4", "mxfp8", "nvfp4"), "affine")
    for name, override in section.values.items():
        if isinstance(override, Mapping):
            module = section.section(name)
            module.integer("bits")
            module.integer("group_size")
            module.only("mode", ("affine", "mxfp4", "mxfp8", "nvfp4"), "affine")
    return dict(section.values)
