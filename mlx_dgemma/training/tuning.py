"""What is trained of a model: low-rank deltas beside linear maps and experts, or whole layers.

mlx-lm's tuner puts LoRA and DoRA layers beside linear maps; experts get a delta each here, because
this network holds gate and up of all experts in one matrix. Parameter names and
`adapter_config.json` are mlx-lm's.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma import kernels
from mlx_dgemma.errors import CheckpointError, InputError, ResourceError
from mlx_dgemma.files import read_json, replacing
from mlx_dgemma.headers import read_header
from mlx_dgemma.kernels.moe import in_blocks
from mlx_dgemma.model import Model
from mlx_dgemma.model.experts import Experts
from mlx_dgemma.model.layers import Weights
from mlx_dgemma.model.names import named_tensors

Kind = Literal["lora", "dora", "full"]
ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
DENSE = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
EXPERTS = "experts"
SELF_CONDITIONING = tuple(
    f"model.decoder.self_conditioning.{part}_proj" for part in ("gate", "up", "down")
)
GROUPS = {
    "attention": ATTENTION,
    "dense": DENSE,
    "experts": (EXPERTS,),
    "self-conditioning": SELF_CONDITIONING,
}
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


@dataclass(frozen=True)
class Tuning:
    """kind: low-rank deltas ("lora"), those with trained row norms ("dora"), or whole layers
    ("full"). num_layers: from the last one backwards; -1 is all. keys: modules within a layer, or
    with their whole name outside the layers. scale: what a delta is multiplied with."""

    kind: Kind = "lora"
    num_layers: int = -1
    rank: int = 8
    scale: float = 4.0
    dropout: float = 0.0
    keys: tuple[str, ...] = ATTENTION + DENSE

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "dora", "full"):
            raise InputError(f"fine_tune_type {self.kind!r} is not lora, dora or full.")
        if self.rank < 1:
            raise InputError(f"rank {self.rank} is not possible: use 1 or more.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout {self.dropout} is not possible: use 0 to below 1.")
        if not math.isfinite(self.scale) or self.scale <= 0:
            raise InputError(f"scale {self.scale} is not possible: use a number above 0.")
        if self.kind == "dora" and EXPERTS in self.keys:
            raise InputError("DoRA cannot train experts: use --fine-tune-type lora for them.")

    @property
    def parameters(self) -> dict[str, Any]:
        """mlx-lm's `lora_parameters`."""
        return {
            "rank": self.rank,
            "scale": self.scale,
            "dropout": self.dropout,
            "keys": list(self.keys),
        }


def attach(model: Model, tuning: Tuning) -> None:
    """Freezes the model and makes trainable what `tuning` says, in place.

    The model must not be joined yet: load it with `lazy=True`. Raises InputError for layers or
    modules that it does not have.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers  # imports transformers

    layers = len(model.layers)
    if not (tuning.num_layers == -1 or 1 <= tuning.num_layers <= layers):
        raise InputError(
            f"num_layers {tuning.num_layers} is not possible: the model has {layers}; -1 is all."
        )
    model.freeze()
    chosen = model.layers[-tuning.num_layers if tuning.num_layers > 0 else 0 :]
    if tuning.kind == "full":
        for layer in chosen:
            if any("scales" in module for module in layer.modules()):
                raise InputError(
                    "Quantized layers cannot be trained whole: use --fine-tune-type lora, or a "
                    "16-bit checkpoint."
                )
            layer.unfreeze()
        return
    width = model.config.text.hidden_size
    if tuning.rank > width:
        raise InputError(f"rank {tuning.rank} is not possible: the model's width is {width}.")
    within = [pair for layer in model.layers for pair in layer.named_modules()]
    named = [*within, *model.named_modules()]
    names = {name for name, module in named if isinstance(module, nn.Linear)} | {EXPERTS}
    unknown = [key for key in tuning.keys if key not in names]
    if unknown or not tuning.keys:
        raise InputError(
            f"The model has no linear map {unknown[0]!r}: name some of "
            f"{', '.join((*ATTENTION, *DENSE, EXPERTS, *SELF_CONDITIONING))}."
            if unknown
            else "No module is named to be trained."
        )
    linear = [key for key in tuning.keys if key != EXPERTS]
    linear_to_lora_layers(
        model, len(chosen), {**tuning.parameters, "keys": linear}, use_dora=tuning.kind == "dora"
    )
    if EXPERTS in tuning.keys:
        for layer in chosen:
            adapted = LoRAExperts(layer.experts, tuning.rank, tuning.scale)
            layer.update_modules({"experts": adapted})


class LoRAExperts(nn.Module):
    """Experts with a low-rank delta each, on both of their matrices."""

    def __init__(self, experts: Experts, rank: int, scale: float) -> None:
        super().__init__()
        self.gate_up_proj = ExpertDelta(experts.gate_up_proj, rank, scale)
        self.down_proj = ExpertDelta(experts.down_proj, rank, scale)

    def __call__(self, x: mx.array, routing: kernels.Routing) -> mx.array:
        """x [T, H] -> [T, H] in the same dtype."""
        return in_blocks(x, routing, self.gate_up_proj, self.down_proj)


class ExpertDelta(nn.Module):
    """W[e] + scale * lora_b[e] @ lora_a[e], with lora_a [E, r, in] and lora_b [E, out, r] as in
    mlx-lm's LoRASwitchLinear."""

    def __init__(self, linear: Weights, rank: int, scale: float) -> None:
        super().__init__()
        experts, outputs, inputs = linear.weight.shape[0], linear.outputs, linear.inputs
        self.linear = linear
        self.scale = scale
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, inputs))
        self.lora_b = mx.zeros((experts, outputs, rank))

    def apply_gathered(self, rows: mx.array, experts: mx.array) -> mx.array:
        """[N, m, out] of blocks of rows [N, m, in], which are sorted by their experts [N]."""
        base = self.linear.matrix(rows.dtype).apply_gathered(rows, experts)
        low = mx.gather_mm(
            rows.astype(self.lora_a.dtype),
            self.lora_a.swapaxes(-1, -2),
            rhs_indices=experts,
            sorted_indices=True,
        )
        delta = mx.gather_mm(
            low, self.lora_b.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=True
        )
        return base + (self.scale * delta).astype(base.dtype)


def trained(model: Model) -> dict[str, mx.array]:
    """The trainable tensors by name."""
    return named_tensors(model.trainable_parameters())


def write_config(folder: Path, tuning: Tuning, *, alone: bool = False, **facts: Any) -> None:
    """adapter_config.json in mlx-lm's form, with `facts` beside.

    alone: an adapter that lies there with another configuration is removed before, so that it is
    never read with this one.
    """
    values = {
        "fine_tune_type": tuning.kind,
        "num_layers": tuning.num_layers,
        "lora_parameters": None if tuning.kind == "full" else tuning.parameters,
        **facts,
    }
    path, text = folder / CONFIG, json.dumps(values, indent=2) + "\n"
    try:
        if alone and not (path.is_file() and path.read_bytes() == text.encode()):
            (folder / WEIGHTS).unlink(missing_ok=True)
        with replacing(path) as partial:
            partial.write_text(text)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}.") from error


def read_tuning(folder: Path) -> Tuning:
    """The tuning that an adapter folder of ours or mlx-lm's was trained with."""
    try:
        values = read_json(folder / CONFIG)
        kind = values.get("fine_tune_type", "lora")
        chosen = values.get("lora_parameters") or {}
        return Tuning(
            kind=kind,
            num_layers=int(values["num_layers"]),
            rank=int(chosen.get("rank", 8)),
            scale=float(chosen.get("scale", 20.0)),
            dropout=float(chosen.get("dropout", 0.0)),
            keys=tuple(chosen.get("keys") or ATTENTION + DENSE),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} is no adapter configuration: {error}.") from error


def load_trained(model: Model, file: Path) -> None:
    """Puts an adapter file's tensors into an attached model; every name and shape must fit."""
    if os.path.exists(file):
        read_header(file)
    try:
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}.") from error
    expected = trained(model)
    for name in sorted({*tensors, *expected}):
        here, there = expected.get(name), tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise CheckpointError(
                f"{file} does not fit this model and these settings: {name} is "
                f"{'missing there' if there is None else list(there.shape)} and "
                f"{'not trained here' if here is None else list(here.shape)}."
            )
    model.load_weights(list(tensors.items()), strict=False)
