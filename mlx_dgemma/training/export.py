"""An adapter of ours in PEFT's form, for transformers.

Our deltas act in both passes, because both share every weight. transformers keeps the passes apart,
so PEFT's form holds each delta twice, for the decoder's module and for the encoder's.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.checkpoint.adapter_folder import ADVICE
from mlx_dgemma.checkpoint.tensorfile import TensorFile
from mlx_dgemma.errors import CheckpointError, InputError, ResourceError
from mlx_dgemma.training.tensor_files import write_tensors
from mlx_dgemma.training.tuning import EXPERTS, WEIGHTS, read_tuning
from mlx_dgemma.untrusted_json import printable

DECODER, ENCODER = "model.decoder.layers.", "model.encoder.language_model.layers."


def to_peft(folder: Path, out: Path) -> None:
    """Writes `out`/adapter_model.safetensors and adapter_config.json, both or none; `out` may be an
    empty folder.

    Raises InputError for whole layers, which are no adapter to PEFT.
    """
    tuning = read_tuning(folder)
    if tuning.kind == "full":
        raise InputError(
            f"An adapter of type {tuning.kind} cannot be written in PEFT's form: fuse it instead."
        )
    pairs = _read_pairs(folder / WEIGHTS)
    tensors: dict[str, mx.array] = {}
    modules, parameters = [], []
    rank = next(iter(pairs.values()))["lora_a"].shape[1]
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
        "r": rank,
        "lora_alpha": tuning.scale * rank,
        "lora_dropout": tuning.dropout,
        "bias": "none",
        "use_dora": tuning.kind == "dora",
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters, reverse=True) or None,  # gate_up before down
        "inference_mode": True,
    }
    try:
        growing = out.absolute().with_name(f"{out.absolute().name}.partial")
    except OSError as error:  # the folder that one is in is gone
        raise ResourceError(f"{out} cannot be written: {error.strerror}.") from error
    try:
        shutil.rmtree(growing, ignore_errors=True)  # what a kill left
        growing.mkdir(parents=True)
        (growing / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(growing / "adapter_model.safetensors", tensors, {"format": "pt"})
        if out.is_dir():  # which may be the one that one is in; the configuration comes last
            for path in sorted(growing.iterdir(), reverse=True):
                path.rename(out / path.name)
        else:
            growing.rename(out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(growing, ignore_errors=True)


def _read_pairs(path: Path) -> dict[str, dict[str, mx.array]]:
    """The tensors of every module's delta by their side. CheckpointError where they are none."""
    file = TensorFile(path, ADVICE)
    pairs: dict[str, dict[str, mx.array]] = defaultdict(dict)
    for name in file.entries:
        module, _, side = name.rpartition(".")
        pairs[module][side] = file.mlx(name)
    if not pairs:
        raise CheckpointError(f"{path} holds no tensors; {ADVICE}.")
    ranks = set()
    for module, pair in pairs.items():
        if not {"lora_a", "lora_b"} <= set(pair) <= {"lora_a", "lora_b", "m"}:
            raise CheckpointError(f"{path}: {printable(module)} is no low-rank delta.")
        a, b = pair["lora_a"], pair["lora_b"]
        experts = f".{EXPERTS}." in module
        one, other = (a.shape[1:2], b.shape[2:3]) if experts else (a.shape[1:], b.shape[:1])
        if a.ndim != (3 if experts else 2) or b.ndim != a.ndim or one != other:
            raise CheckpointError(
                f"{path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} of "
                f"{printable(module)} do not fit."
            )
        if not all(mx.isfinite(tensor).all() for tensor in pair.values()):
            raise CheckpointError(f"{path}: the delta of {printable(module)} holds NaN or Inf.")
        ranks.add(one)
    if len(ranks) > 1:
        raise CheckpointError(f"{path}: its deltas are of several ranks, and PEFT's form has one.")
    return pairs


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
