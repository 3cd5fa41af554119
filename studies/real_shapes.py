"""A stand-in for google/diffusiongemma-26B-A4B-it: its names and shapes in sparse files.

Holes read as zeros and cost no disk; some layers can be given real (random) numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dgemma.benchmark.synthetic import published_config
from mlx_dgemma.convert.shards import Output, Shard, index_of, plan_shards
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.parameters import parameter_shapes

__all__ = ["fill", "published_config", "random_bfloat16", "write_sparse"]


def write_sparse(folder: Path, config: dict[str, Any], *, layout: str = "hf") -> list[Shard]:
    """Write config.json, the index and sparse bf16 shards; returns the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    parsed = ModelConfig.from_dict(config)
    shapes = parameter_shapes(parsed, "hf" if layout == "hf" else "mlx", scaled=())
    shards = plan_shards(Output(name, "BF16", shape) for name, (shape, _) in shapes.items())
    for shard in shards:
        header, offset = {}, 0
        for output in shard.outputs:
            header[output.name] = {
                "dtype": output.dtype,
                "shape": list(output.shape),
                "data_offsets": [offset, offset + output.nbytes],
            }
            offset += output.nbytes
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / shard.filename).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_of(shards)))
    return shards


def fill(folder: Path, shards: list[Shard], *prefixes: str, seed: int = 0) -> int:
    """Give the tensors whose names begin with a prefix random bf16 numbers; returns the bytes."""
    generator = np.random.default_rng(seed)
    filled = 0
    for shard in shards:
        with (folder / shard.filename).open("r+b") as file:
            base = 8 + int.from_bytes(file.read(8), "little")
            for output in shard.outputs:
                if output.name.startswith(prefixes):
                    file.seek(base)
                    for start in range(0, output.nbytes, 64 << 20):
                        count = min(64 << 20, output.nbytes - start) // 2
                        file.write(random_bfloat16(generator, count))
                    filled += output.nbytes
                base += output.nbytes
    return filled


def random_bfloat16(generator: np.random.Generator, count: int) -> np.ndarray:
    """Bits of finite bf16 numbers of both signs with magnitudes from 2^-9 to 2^-2."""
    bits = generator.integers(0, 1 << 16, count, dtype=np.uint16)
    exponent = (np.uint16(118) + ((bits >> np.uint16(7)) & np.uint16(7))) << np.uint16(7)
    return (bits & np.uint16(0x807F)) | exponent
