"""An adapter of ours in PEFT's form, for transformers.

Our deltas act in both passes, because both share every weight. transformers keeps the passes apart,
so PEFT's form holds each delta twice, for the decoder's module and for the encoder's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.errors import InputError
from mlx_dgemma.training.tensor_files import write_tensors
from mlx_dgemma.training.tuning import EXPERTS, WEIGHTS, read_tuning

DECODER, ENCODER = "model.decoder.layers.", "model.encoder.language_model.layers."


def to_peft(folder: Path, out: Path) -> None:
    """Writes `out`/adapter_model.safetensors and adapter_config.json.

    Raises InputError for whole layers, which are no adapter to PEFT.
    """
    tuning = read_tuning(folder)
    if tuning.kind == "full":
        raise InputError(
            f"An adapter of type {tuning.kind} cannot be written in PEFT's form: fuse it instead."
        )
    loaded = mx.load(str(folder / WEIGHTS))
    assert isinstance(loaded, dict)
    pairs: dict[str, dict[str, mx.array]] = defaultdict(dict)
    for name, tensor in loaded.items():
        module, _, side = name.rpartition(".")
        pairs[module][side] = tensor
    tensors: dict[str, mx.array] = {}
    modules, parameters = [], []
    for module, pair in pairs.items():
        copies = [module]
        if module.startswith(DECODER):
            copies.append(ENCODER + module.removeprefix(DECODER))
        a, b = _matrices(module, pair["lora_a"], pair["lora_b"])
        for copy in copies:
            wrapped = _wrapper(copy)
            if wrapped == copy:
                modules.append(copy)
            else:
                parameters.append(copy)
            tensors[f"base_model.model.{wrapped}.lora_A.weight"] = a
            tensors[f"base_model.model.{wrapped}.lora_B.weight"] = b
            if "m" in pair:
                tensors[f"base_model.model.{wrapped}.lora_magnitude_vector"] = pair["m"]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": tuning.rank,
        "lora_alpha": tuning.scale * tuning.rank,
        "lora_dropout": tuning.dropout,
        "bias": "none",
        "use_dora": tuning.kind == "dora",
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters, reverse=True) or None,  # gate_up before down
        "inference_mode": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / "adapter_model.safetensors", tensors, {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _matrices(module: str, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """lora_A [r, in] and lora_B [out, r]; of experts A's rows by expert, B's columns by rank."""
    if f".{EXPERTS}." not in module:
        return mx.contiguous(a.T), mx.contiguous(b.T)
    _, outputs, _ = b.shape
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(outputs, -1)


def _wrapper(module: str) -> str:
    """The module that PEFT wraps: it wraps the experts once for each of their two parameters, the
    second around the first."""
    experts, found, projection = module.partition(f".{EXPERTS}.")
    if not found:
        return module
    return f"{experts}.{EXPERTS}" + (".base_layer" if projection == "gate_up_proj" else "")
