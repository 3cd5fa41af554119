"""Checkpoints with the real names and shapes that cost no disk: a true header over a hole."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
from pathlib import Path
from typing import Any

from configs import published_4bit
from mlx.utils import tree_flatten

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.model import ModelConfig
from mlx_dgemma.model.parameters import parameter_shapes

CODES = {"bfloat16": ("BF16", 2), "uint32": ("U32", 4), "float32": ("F32", 4)}
SHARD_BYTES = 5 << 30


def real_config(kind: str) -> dict[str, Any]:
    """config.json with the real sizes for one kind of repository."""
    config = published_4bit()
    config.pop("quantization_config", None)
    if kind == "8bit":
        config["quantization"] = {"group_size": 64, "bits": 8, "mode": "affine"}
    elif kind != "4bit":
        config.pop("quantization")
    return config


def write_sparse(folder: Path, kind: str) -> Path:
    """Write config.json, index and sparse shards; kind is "4bit", "8bit", "bf16" or "hf"."""
    config = real_config(kind)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    table = parameter_shapes(ModelConfig.from_dict(config), "hf" if kind == "hf" else "mlx")
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, (shape, dtype) in table.items():
        code, width = CODES[dtype]
        size = width * math.prod(shape)
        if filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [filled, filled + size],
        }
        filled += size
    weight_map = {}
    for number, entries in enumerate(shards, 1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(entries, shard))
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with (folder / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
        end = max(entry["data_offsets"][1] for entry in entries.values())
        os.truncate(folder / shard, 8 + len(header) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load_all(folder: str) -> None:
    """Load every kind lazily; prints tensors per kind and this process' peak memory as JSON."""
    counts = {}
    for kind in ("4bit", "8bit", "bf16", "hf"):
        model = load_model(write_sparse(Path(folder) / kind, kind), lazy=True)
        model.make_cache()
        counts[kind] = len(tree_flatten(model.parameters()))
    print(json.dumps({"tensors": counts, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """Peak resident memory of this process alone: Linux lets ru_maxrss survive an exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
