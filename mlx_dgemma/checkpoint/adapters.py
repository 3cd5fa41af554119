"""LoRA adapters in PEFT's format, merged into the weights.

PEFT sees the encoder's and the decoder's copy of one tied weight as two modules and trains a
delta for each; its own merge adds both to the shared weight, which is neither pass's trained
function. Here the decoder's delta is merged, and an adapter whose encoder deltas differ is
refused. What cannot be expressed as a delta of one weight is refused as well.

A large adapter is as large as a small model: its matrices stay in their file, and of a weight
the rows that are merged are widened to float32, nothing else.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.errors import CheckpointError, ModelNotFoundError
from mlx_dgemma.files import read_json
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.names import is_tied_duplicate, tied_to
from mlx_dgemma.model.packing import Quantization, quantization_of
from mlx_dgemma.model.parameters import matrices

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# What is widened to float32 at a time when an adapter is merged at load.
SLICE_BYTES = 64 << 20

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
    """`scale * B @ A` of one matrix, or one such product per expert; A and B are not read yet.

    shape: of the weight. file, a, b: the file and the names of A, [rank, in] or
    [experts * rank, in], and B, [out, rank] or [out, rank * experts]. experts: how many, or None.
    """

    shape: tuple[int, ...]
    file: Path
    a: str
    b: str
    scale: float
    experts: int | None = None

    def read(self) -> tuple[mx.array, mx.array]:
        """A and B as stored and unevaluated, by expert where there are experts.

        They are read when they are evaluated, and kept as long as they are held.
        """
        tensors = _open(self.file)
        a, b = tensors[self.a], tensors[self.b]
        if self.experts is None:
            return a, b
        # A's rows are grouped by expert, B's columns by rank.
        by_expert = b.reshape(b.shape[0], -1, self.experts).transpose(2, 0, 1)
        return a.reshape(self.experts, -1, a.shape[1]), by_expert

    def rows(self, pair: tuple[mx.array, mx.array], start: int, stop: int) -> mx.array:
        """float32 rows (or experts) [start, stop) of the delta, from what `read` gave."""
        a, b = pair
        if self.experts is not None:
            a = a[start:stop]
        return self.scale * (b[start:stop].astype(mx.float32) @ a.astype(mx.float32))


class Adapter:
    """The deltas of an adapter folder by weight name (MLX-community layout)."""

    def __init__(self, folder: Path, deltas: dict[str, Delta]) -> None:
        self.folder = folder
        self.deltas = deltas
        # The rows of a weight are merged slice by slice: its pair is read once.
        self._latest: tuple[str, tuple[mx.array, mx.array]] | None = None

    def merged(self, name: str, rows: mx.array, start: int) -> mx.array:
        """Rows of weight `name` beginning at `start`, with the delta added in float32."""
        delta = self.deltas.get(name)
        if delta is None:
            return rows
        if self._latest is None or self._latest[0] != name:
            self._latest = (name, delta.read())
        added = delta.rows(self._latest[1], start, start + rows.shape[0])
        return rows.astype(mx.float32) + added


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
    shapes = matrices(config)
    deltas: dict[str, Delta] = {}
    encoder: dict[str, Delta] = {}
    for module, delta in _deltas(path, shapes, settings):
        weight = f"{module}.weight"
        tied = is_tied_duplicate(weight)
        name = tied_to(weight) if tied else weight
        expected = shapes.get(name.removesuffix(".weight"))
        if delta.shape != expected:
            fits = "no such weight" if expected is None else f"a weight of {list(expected)}"
            raise CheckpointError(
                f"{path}: the delta of {module} is {list(delta.shape)} and the model has {fits}; "
                "the adapter was trained on another model."
            )
        if not all(mx.isfinite(matrix).all().item() for matrix in delta.read()):
            raise CheckpointError(f"{path}: the delta of {module} holds NaN or Inf.")
        (encoder if tied else deltas)[name] = delta
    for name, delta in encoder.items():
        if not _same(delta, deltas.get(name)):
            raise CheckpointError(
                f"{path}: encoder and decoder share {name} but were trained apart; "
                "an adapter can change the shared weight only once."
            )
    return Adapter(folder, deltas)


def _open(path: Path) -> dict[str, mx.array]:
    """Every tensor of the adapter's file, unread."""
    try:
        tensors = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged; copy the adapter again.") from error
    assert isinstance(tensors, dict)
    return tensors


def _refuse_kinds(settings: Mapping[str, Any], folder: Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder}: peft_type {kind!r} is not supported; only LORA is.")
    for key, why in _REFUSED.items():
        if settings.get(key):
            raise CheckpointError(f"{folder}: {key} is not supported: {why}.")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"{folder}: trained biases (bias) have no place in this network.")


_Shapes = Mapping[str, tuple[int, ...]]


def _deltas(
    path: Path, shapes: _Shapes, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Delta]]:
    """(module, delta) for every adapted matrix, by the names and shapes of the file alone."""
    stored: dict[str, tuple[int, ...]] = {}
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in _open(path).items():
        if "embed_tokens" in key or "lm_head" in key:
            raise CheckpointError(
                f"{path}: adapts the embedding table, which is also the output head and the "
                "self-conditioning table; such an adapter cannot be merged."
            )
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise CheckpointError(f"{path}: {key} is no low-rank delta of a linear layer.")
        stored[key] = tensor.shape
        found[match["module"]][match["nested"]][match["side"]] = key
    for module, wrappers in found.items():
        for pair in wrappers.values():
            if set(pair) != {"A", "B"}:
                raise CheckpointError(f"{path}: {module} has lora_{next(iter(pair))} only.")
            (a_rows, width_in), (width_out, b_columns) = stored[pair["A"]], stored[pair["B"]]
            name, experts = module, None
            shape: tuple[int, ...] = (width_out, width_in)
            if module.endswith(".experts"):
                name, experts = _experts_weight(module, shape, shapes, path)
                shape = (experts, *shape)
            elif len(wrappers) > 1:
                raise CheckpointError(f"{path}: {module} is adapted twice.")
            if a_rows != b_columns or a_rows % (experts or 1):
                raise CheckpointError(f"{path}: A and B of {module} have different ranks.")
            scale = _scale(name, a_rows // (experts or 1), settings)
            yield name, Delta(shape, path, pair["A"], pair["B"], scale, experts)


def _experts_weight(
    module: str, shape: tuple[int, ...], shapes: _Shapes, path: Path
) -> tuple[str, int]:
    """Which of the two expert weights a delta belongs to, by its widths, and for how many experts.

    PEFT wraps the second parameter around the first, so a name says `experts` or
    `experts.base_layer` whichever was adapted; the widths are unambiguous.
    """
    decoder = tied_to(module) if is_tied_duplicate(module) else module
    for projection in ("gate_up_proj", "down_proj"):
        weight = shapes.get(f"{decoder}.{projection}")
        if weight is not None and weight[1:] == shape:
            return f"{module}.{projection}", weight[0]
    raise CheckpointError(
        f"{path}: the delta of {module} maps {shape[1]} to {shape[0]}, which no expert weight of "
        "this model does; the adapter was trained on another model."
    )


def _scale(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    alpha = float(settings.get("lora_alpha", 8))
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)


def _same(encoder: Delta, decoder: Delta | None) -> bool:
    """Whether both passes would get the same weight; an untrained delta (B = 0) counts as zero."""
    ours = encoder.read()
    theirs = None if decoder is None else decoder.read()
    step = encoder.shape[0] if encoder.experts is None else 1
    for start in range(0, encoder.shape[0], step):
        mine = encoder.rows(ours, start, start + step)
        other = mx.zeros_like(mine)
        if decoder is not None and theirs is not None:
            other = decoder.rows(theirs, start, start + step)
        if not mx.allclose(mine, other, rtol=1e-5, atol=1e-8).item():
            return False
    return True


def merge_parameters(
    parameters: dict[str, mx.array], adapter: Adapter, config: ModelConfig, *, read: bool
) -> None:
    """Merges the adapter into tensors as they are stored, in their place.

    A packed matrix is dequantized, merged and packed again as it was; merging before
    quantization (`mlx_dgemma.convert --adapter-path`) rounds once instead of twice.
    read: read the adapted tensors now, one slice of one tensor after the other; else everything
    stays unevaluated.
    """
    for name in adapter.deltas:
        module = name.removesuffix(".weight")
        packing = None
        if f"{module}.scales" in parameters:
            packing = quantization_of(config.quantization, module)
        suffixes = ("weight",) if packing is None else ("weight", "scales", "biases")
        names = [name, *(f"{module}.{suffix}" for suffix in suffixes[1:])]
        names = [part for part in names if part in parameters]
        stored = [parameters.pop(part) for part in names]
        merged: list[list[mx.array]] = [[] for _ in names]
        delta = adapter.deltas[name]
        rows = max(1, SLICE_BYTES // (4 * prod(delta.shape[1:])))
        for start in range(0, delta.shape[0], rows):
            slices = [part[start : start + rows] for part in stored]
            again = _merged_slice(slices, adapter, name, start, packing)
            if read:
                mx.eval(again)
            for parts, part in zip(merged, again, strict=True):
                parts.append(part)
        for part_name, pieces in zip(names, merged, strict=True):
            parameters[part_name] = mx.concatenate(pieces)
        if read:
            del stored, slices, again
            mx.eval([parameters[part_name] for part_name in names])
            merged.clear()
            mx.clear_cache()


def _merged_slice(
    stored: list[mx.array],
    adapter: Adapter,
    name: str,
    start: int,
    packing: Quantization | None,
) -> list[mx.array]:
    """Some rows of a weight (with scales and biases if it is packed), merged."""
    if packing is None:
        return [adapter.merged(name, stored[0], start).astype(stored[0].dtype)]
    how: dict[str, Any] = {
        "group_size": packing.group_size,
        "bits": packing.bits,
        "mode": packing.mode,
    }
    weight, scales, *biases = stored
    dense = mx.dequantize(weight, scales, biases[0] if biases else None, **how)
    return list(mx.quantize(adapter.merged(name, dense, start).astype(dense.dtype), **how))
