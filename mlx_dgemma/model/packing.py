"""How a matrix is packed, and what config.json says about each module's packing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantization:
    """How one matrix is packed. `affine` has biases; the other modes do not."""

    group_size: int
    bits: int
    mode: str = "affine"

    def packed(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Suffix -> shape and dtype of the tensors that replace one dense matrix."""
        *rows, width = shape
        groups = (*rows, width // self.group_size)
        tensors = {"weight": ((*rows, width * self.bits // 32), "uint32")}
        tensors["scales"] = (groups, dtype if self.mode == "affine" else "uint8")
        if self.mode == "affine":
            tensors["biases"] = (groups, dtype)
        return tensors


def quantization_of(quantization: Mapping[str, Any] | None, module: str) -> Quantization | None:
    """What config.json says about one module; None where it leaves the module dense.

    An override without `mode` means affine, whatever the global mode is.
    """
    if quantization is None:
        return None
    override = quantization.get(module)
    if override is False:
        return None
    values = override if isinstance(override, Mapping) else quantization
    return Quantization(
        int(values["group_size"]), int(values["bits"]), values.get("mode") or "affine"
    )
