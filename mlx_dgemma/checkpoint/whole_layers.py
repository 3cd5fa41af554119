"""Layers that were trained whole: whether they are this model's."""

from __future__ import annotations

import mlx.core as mx

from mlx_dgemma.checkpoint.tensorfile import TensorFile
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.packing import quantization_of
from mlx_dgemma.model.parameters import matrices, parameter_shapes
from mlx_dgemma.untrusted_json import printable


def check_whole(file: TensorFile, config: ModelConfig) -> None:
    """Raises CheckpointError where a parameter is not one of the model's, or is packed there."""
    dense = {f"{module}.weight": shape for module, shape in matrices(config).items()}
    stored = parameter_shapes(config, "mlx", scaled=())
    for name, entry in file.entries.items():
        expected = dense.get(name, stored[name][0] if name in stored else None)
        if expected is None or entry.shape != expected:
            fits = "no such parameter" if expected is None else f"one of {list(expected)}"
            raise CheckpointError(
                f"{file.path}: {printable(name)} is {list(entry.shape)} and the model has {fits}; "
                "these layers were trained on another model."
            )
        if quantization_of(config.quantization, name.removesuffix(".weight")) is not None:
            raise CheckpointError(
                f"{file.path}: {name} replaces a matrix that this checkpoint quantizes; give the "
                "16-bit checkpoint that it was trained on."
            )
        if not mx.isfinite(file.mlx(name)).all().item():
            raise CheckpointError(f"{file.path}: {name} holds NaN or Inf.")
