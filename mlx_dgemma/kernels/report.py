"""What `mlx_dgemma.doctor` tells of the kernels: mode, and per operation its status and timing."""

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from mlx_dgemma.kernels import registry, verdicts
from mlx_dgemma.kernels.soft_embeddings import CAPACITY

EVIDENCE = "checked by emulation on Linux; not yet run on Apple hardware"


def published_shapes() -> dict[str, registry.Shape]:
    """The shape classes of one denoising step of the published 4-bit checkpoint."""
    dtype, table = "mlx.core.bfloat16", "affine 8/64"
    rows = {"rows": 256}
    return {
        "row_statistics": {"dtype": dtype, "vocabulary": 262144, **rows},
        "accept": {"length": 256},
        "survivors": {
            "dtype": dtype,
            "table": dtype,
            "vocabulary": 262144,
            "capacity": CAPACITY,
            **rows,
        },
        "gather_embeddings": {
            "dtype": dtype,
            "table": table,
            "hidden": 2816,
            "capacity": CAPACITY,
            **rows,
        },
        "normed_heads": {
            "dtype": dtype,
            "length": 256,
            "heads": 16,
            "head_dim": 256,
            "rope": 1,
        },
        "attention": {
            "dtype": dtype,
            "length": 256,
            "heads": 16,
            "kv_heads": 2,
            "head_dim": 512,
        },
        "router": {"dtype": dtype, "tokens": 256, "experts": 128, "top_k": 8},
        "moe": {
            "dtype": dtype,
            "tokens": 256,
            "hidden": 2816,
            "width": 704,
            "experts": 128,
            "top_k": 8,
            "gate_up": "affine 4/64",
            "down": "affine 4/64",
        },
    }


def report(*, check: bool = False) -> dict[str, Any]:
    """Everything as plain values, ready for JSON.

    With `check`, every operation is self-checked at the published shapes, known or not (only where
    Metal is there; each takes seconds). Keys: mode, metal, mlx, system, chip, evidence, operations;
    an operation has name, version, verdicts by shape, and a one-line status.
    """
    usable = registry.available() and registry.mode() != "off"
    if check and usable:
        for name, shape in published_shapes().items():
            verdicts.verdict(registry.operations()[name], shape, again=True)
    known = verdicts.remembered()
    return {
        "mode": registry.mode(),
        "metal": registry.available(),
        "mlx": version("mlx"),
        "system": verdicts.system(),
        "chip": verdicts.chip(),
        "evidence": EVIDENCE,
        "operations": [
            _operation(operation, known, usable) for operation in registry.operations().values()
        ],
    }


def _operation(
    operation: registry.Operation, known: dict[str, verdicts.Verdict], usable: bool
) -> dict[str, Any]:
    prefix = verdicts.verdict_key(operation, {})
    mine = {
        key.removeprefix(prefix).strip(): found
        for key, found in known.items()
        if key.startswith(prefix)
    }
    if not usable:
        status = "twin (no Metal device here)" if registry.mode() != "off" else "twin (mode off)"
    elif registry.mode() == "force":
        status = "kernel (mode force)"
    elif not mine:
        status = "not checked yet"
    else:
        status = "; ".join(
            f"{'kernel' if found.enabled else 'twin'}: {found.reason}" for found in mine.values()
        )
    return {
        "name": operation.name,
        "version": operation.version,
        "status": status,
        "verdicts": {shape: asdict(found) for shape, found in mine.items()},
    }
