"""LoRA adapters in PEFT's format, merged into the weights.

PEFT sees the encoder's and the decoder's copy of one tied weight as two modules and trains a
delta for each; its own merge adds both to the shared weight, which is neither pass's trained
function. Here the decoder's delta is merged, and an adapter whose encoder deltas differ is
refused. What cannot be expressed as a delta of one weight is refused as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.errors import CheckpointError, ModelNotFoundError
from mlx_dgemma.model.config import ModelConfig, read_json
from mlx_dgemma.model.names import (
    is_tied_duplicate,
    matrices,
    quantization_of,
    tied_to,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?P<nested>(?:\.base_layer)*)"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
# Entries of adapter_config.json that change what the weights mean, and the value we can honour.
_REFUSED = {
    "use_dora": "DoRA scales whole rows of the merged weight",
    "modules_to_save": "modules_to_save replaces whole weights",
    "fan_in_fan_out": "fan_in_fan_out transposes weights that this network does not transpose",
    "lora_bias": "lora_bias adds biases that this network does not have",
    "trainable_token_indices": "trained token rows are no low-rank deltas",
    "layer_replication": "layer_replication changes the number of layers",
    "alora_invocation_tokens": "aLoRA applies to a part of the sequence only",
}


@dataclass(frozen=True)
class Delta:
    """`scale * B @ A` of one matrix, or one such product per expert.

    a: [rank, in] or [experts, rank, in]; b: [out, rank] or [experts, out, rank]; float32.
    """

    a: mx.array
    b: mx.array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.b.shape[:-1], self.a.shape[-1])

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows (or experts) [start, stop) of the delta."""
        a = self.a[start:stop] if self.a.ndim == 3 else self.a
        return self.scale * (self.b[start:stop] @ a)


@dataclass(frozen=True)
class Adapter:
    """The deltas of an adapter folder by weight name (MLX-community layout)."""

    folder: Path
    deltas: dict[str, Delta]

    def merged(self, name: str, rows: mx.array, start: int) -> mx.array:
        """Rows of weight `name` beginning at `start`, with the delta added in float32."""
        delta = self.deltas.get(name)
        if delta is None:
            return rows
        return rows.astype(mx.float32) + delta.rows(start, start + rows.shape[0])


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """Read a PEFT LoRA adapter for a model of this config.

    Raises ModelNotFoundError without a folder, CheckpointError for an adapter that is damaged,
    made for another model, or of a kind that cannot be merged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise ModelNotFoundError(f"{folder} has no {CONFIG}; give the folder of a PEFT adapter.")
    settings = read_json(folder / CONFIG)
    _refuse_kinds(settings, folder)
    path = folder / WEIGHTS
    try:
        tensors = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged; copy the adapter again.") from error
    assert isinstance(tensors, dict)
    shapes = matrices(config)
    deltas: dict[str, Delta] = {}
    encoder: dict[str, Delta] = {}
    for module, pair in _pairs(tensors, shapes, path):
        weight = f"{module}.weight"
        tied = is_tied_duplicate(weight)
        name = tied_to(weight) if tied else weight
        delta = _delta(module, pair, settings)
        expected = shapes.get(name.removesuffix(".weight"))
        if delta.shape != expected:
            fits = "no such weight" if expected is None else f"a weight of {list(expected)}"
            raise CheckpointError(
                f"{path}: the delta of {module} is {list(delta.shape)} and the model has {fits}; "
                "the adapter was trained on another model."
            )
        if not (mx.isfinite(delta.a).all().item() and mx.isfinite(delta.b).all().item()):
            raise CheckpointError(f"{path}: the delta of {module} holds NaN or Inf.")
        (encoder if tied else deltas)[name] = delta
    for name, delta in encoder.items():
        if not _same(delta, deltas.get(name)):
            raise CheckpointError(
                f"{path}: encoder and decoder share {name} but were trained apart; "
                "an adapter can change the shared weight only once."
            )
    return Adapter(folder, deltas)


def _refuse_kinds(settings: Mapping[str, Any], folder: Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder}: peft_type {kind!r} is not supported; only LORA is.")
    for key, why in _REFUSED.items():
        if settings.get(key):
            raise CheckpointError(f"{folder}: {key} is not supported: {why}.")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"{folder}: trained biases (bias) have no place in this network.")


_Pair = dict[str, mx.array]


def _pairs(
    tensors: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> Iterator[tuple[str, _Pair]]:
    """(module, {"A", "B"}) for every adapted matrix; experts are reshaped to [experts, ...]."""
    found: dict[str, dict[str, _Pair]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in tensors.items():
        if "embed_tokens" in key or "lm_head" in key:
            raise CheckpointError(
                f"{path}: adapts the embedding table, which is also the output head and the "
                "self-conditioning table; such an adapter cannot be merged."
            )
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise CheckpointError(f"{path}: {key} is no low-rank delta of a linear layer.")
        found[match["module"]][match["nested"]][match["side"]] = tensor.astype(mx.float32)
    for module, wrappers in found.items():
        for pair in wrappers.values():
            if set(pair) != {"A", "B"}:
                raise CheckpointError(f"{path}: {module} has lora_{next(iter(pair))} only.")
            if module.endswith(".experts"):
                yield _experts_pair(module, pair, shapes, path)
            elif len(wrappers) > 1:
                raise CheckpointError(f"{path}: {module} is adapted twice.")
            else:
                yield module, pair


def _experts_pair(
    module: str, pair: _Pair, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> tuple[str, _Pair]:
    """Which of the two expert weights a pair belongs to, by its widths, split by expert.

    PEFT wraps the second parameter around the first, so a name says `experts` or
    `experts.base_layer` whichever was adapted; the widths are unambiguous.
    """
    width_in, width_out = pair["A"].shape[1], pair["B"].shape[0]
    decoder = tied_to(module) if is_tied_duplicate(module) else module
    for projection in ("gate_up_proj", "down_proj"):
        shape = shapes.get(f"{decoder}.{projection}")
        if shape is not None and shape[1:] == (width_out, width_in):
            experts = shape[0]
            # A's rows are grouped by expert, B's columns by rank.
            a = pair["A"].reshape(experts, -1, width_in)
            b = pair["B"].reshape(width_out, -1, experts).transpose(2, 0, 1)
            return f"{module}.{projection}", {"A": a, "B": b}
    raise CheckpointError(
        f"{path}: the delta of {module} maps {width_in} to {width_out}, which no expert weight of "
        "this model does; the adapter was trained on another model."
    )


def _delta(module: str, pair: _Pair, settings: Mapping[str, Any]) -> Delta:
    rank = pair["A"].shape[-2]
    alpha = float(settings.get("lora_alpha", 8))
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    scale = alpha / (sqrt(rank) if settings.get("use_rslora") else rank)
    return Delta(pair["A"], pair["B"], scale)


def _same(encoder: Delta, decoder: Delta | None) -> bool:
    """Whether both passes would get the same weight; an untrained delta (B = 0) counts as zero."""
    for start in range(encoder.shape[0] if encoder.a.ndim == 3 else 1):
        rows = (start, start + 1) if encoder.a.ndim == 3 else (0, encoder.shape[0])
        ours = encoder.rows(*rows)
        theirs = mx.zeros_like(ours) if decoder is None else decoder.rows(*rows)
        if not mx.allclose(ours, theirs, rtol=1e-5, atol=1e-8).item():
            return False
    return True


def merge_parameters(
    parameters: Mapping[str, mx.array], adapter: Adapter, config: ModelConfig
) -> dict[str, mx.array]:
    """Tensors as they are stored -> the same with the adapter merged, unevaluated.

    A packed matrix is dequantized, merged and packed again as it was; merging before
    quantization (`mlx_dgemma.convert --adapter-path`) rounds once instead of twice.
    """
    merged = dict(parameters)
    for name in adapter.deltas:
        module = name.removesuffix(".weight")
        stored = parameters[name]
        packing = None
        if f"{module}.scales" in parameters:
            packing = quantization_of(config.quantization, module)
        if packing is None:
            merged[name] = adapter.merged(name, stored, 0).astype(stored.dtype)
            continue
        how: dict[str, Any] = {
            "group_size": packing.group_size,
            "bits": packing.bits,
            "mode": packing.mode,
        }
        scales, biases = parameters[f"{module}.scales"], parameters.get(f"{module}.biases")
        dense = mx.dequantize(stored, scales, biases, **how)
        again = mx.quantize(adapter.merged(name, dense, 0).astype(dense.dtype), **how)
        for suffix, tensor in zip(("weight", "scales", "biases"), again, strict=False):
            merged[f"{module}.{suffix}"] = tensor
    return merged
