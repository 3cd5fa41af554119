"""What a checkpoint holds, module by module, here or on the Hub, without reading a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from mlx_dgemma.checkpoint.hub import local_folder, resolve_model
from mlx_dgemma.checkpoint.plan import plan as memory_plan
from mlx_dgemma.convert.remote import local_files, read_headers
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.headers import Entry
from mlx_dgemma.machine.memory import SYSTEM_RESERVE
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.packing import quantization_of

# Memory of Macs in GB, and the share of it that macOS keeps resident for the GPU by default:
# two thirds up to 32 GB, three quarters above.
MAC_MEMORY = (16, 18, 24, 32, 36, 48, 64, 96, 128)
CONTEXT_TOKENS = 8192

_PART = re.compile(r"(?P<module>.+)\.(?P<part>weight|scales|biases)")
_LAYER = re.compile(r"(\.layers\.)(\d+)(\.)")


@dataclass(frozen=True)
class Row:
    """One module (or parameter): its dense shape, how it is stored, and its bytes."""

    module: str
    count: int
    shape: tuple[int, ...]
    stored: str
    bits_per_weight: float
    nbytes: int


@dataclass(frozen=True)
class Fit:
    """Whether a Mac with `memory_gb` holds the model with an 8k context.

    "yes": within what macOS gives the GPU by default; "raise": only with a higher
    iogpu.wired_limit_mb; "no": not with 3 GB left for the system.
    """

    memory_gb: int
    default_gpu_gb: float
    fits: str


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` prints."""

    source: str
    rows: tuple[Row, ...]
    tensors: int
    total_size: int
    parameters: int
    bits_per_weight: float
    needed_bytes: int
    fits: tuple[Fit, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path_or_repo: str | Path, revision: str | None = None) -> Inspection:
    """Describe a checkpoint folder, or a Hub repository by its files' headers alone.

    Raises ModelNotFoundError or CheckpointError.
    """
    folder = local_folder(path_or_repo)
    if folder is not None:
        resolve_model(folder, revision=revision)  # refuses a revision of a folder
        config, files = ModelConfig.from_folder(folder), local_files(folder)
    else:
        _, config, files = read_headers(str(path_or_repo), revision)
    stored = {name: entry for file in files.values() for name, entry in file.entries.items()}
    for file in files.values():
        file.close()
    rows = _rows(config, stored)
    total = sum(tensor.nbytes for tensor in stored.values())
    parameters = sum(row.count * prod(row.shape) for row in rows)
    plan = memory_plan(config, context_tokens=CONTEXT_TOKENS, weights=total)
    return Inspection(
        source=str(path_or_repo),
        rows=tuple(rows),
        tensors=len(stored),
        total_size=total,
        parameters=parameters,
        bits_per_weight=8 * total / max(parameters, 1),
        needed_bytes=plan.total,
        fits=tuple(fit(size, plan.total) for size in MAC_MEMORY),
    )


def _rows(config: ModelConfig, stored: Mapping[str, Entry]) -> list[Row]:
    """One row for every module, those of many layers with the same form together."""
    modules: dict[str, dict[str, Entry]] = {}
    for name, tensor in stored.items():
        match = _PART.fullmatch(name)
        module, part = (match["module"], match["part"]) if match else (name, "weight")
        modules.setdefault(module, {})[part] = tensor
    grouped: dict[tuple[Any, ...], Row] = {}
    for module, parts in modules.items():
        row = _row(config, module, parts)
        key = (_LAYER.sub(r"\1N\3", module), row.shape, row.stored)
        same = grouped.get(key)
        grouped[key] = Row(
            module=key[0] if same else module,
            count=1 + (same.count if same else 0),
            shape=row.shape,
            stored=row.stored,
            bits_per_weight=row.bits_per_weight,
            nbytes=row.nbytes + (same.nbytes if same else 0),
        )
    return sorted(grouped.values(), key=lambda row: -row.nbytes)


def _row(config: ModelConfig, module: str, parts: Mapping[str, Entry]) -> Row:
    weight = parts.get("weight") or next(iter(parts.values()))
    shape, how = weight.shape, weight.code
    if "scales" in parts:
        packing = quantization_of(config.quantization, module)
        if packing is None:
            raise CheckpointError(f"{module} is quantized but config.json does not say how.")
        shape = (*shape[:-1], shape[-1] * 32 // packing.bits)
        how = f"{packing.mode} {packing.bits}-bit, groups of {packing.group_size}"
    nbytes = sum(tensor.nbytes for tensor in parts.values())
    return Row(module, 1, shape, how, 8 * nbytes / max(prod(shape), 1), nbytes)


def fit(gigabytes: int, needed: int) -> Fit:
    total = gigabytes * 2**30
    default = total * (2 / 3 if gigabytes <= 32 else 3 / 4)
    fits = "yes" if needed <= default else "raise" if needed <= total - SYSTEM_RESERVE else "no"
    return Fit(gigabytes, default / 1e9, fits)
