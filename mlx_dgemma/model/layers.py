"""The small parts: linear maps and embeddings, dense or quantized, and the gated MLP.

A module declares its tensors under the checkpoint's names (`weight`, `scales`, `biases`) and
shapes, as zeros that are never computed; the loader puts the checkpoint's in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma import kernels
from mlx_dgemma.kernels.moe import geglu
from mlx_dgemma.model.packing import Quantization

if TYPE_CHECKING:
    from mlx_lm.tuner.lora import LoRALinear


class Weights(nn.Module):
    """A matrix [..., out, in], dense, or packed with `group_size`, `bits` and `mode`."""

    def __init__(self, *shape: int) -> None:
        nn.Module.__init__(self)
        self.weight = mx.zeros(shape)

    @property
    def packing(self) -> Quantization | None:
        """How it is packed; None where it is dense."""
        if "scales" not in self:
            return None
        return Quantization(self.group_size, self.bits, self.mode)

    def matrix(self, dtype: mx.Dtype) -> kernels.Matrix:
        """What it holds, as the fused operations take it, computing in `dtype`."""
        if "scales" not in self:
            return kernels.Matrix(self.weight)
        return kernels.Matrix(
            self.weight,
            self.scales,
            self.get("biases"),
            self.group_size,
            self.bits,
            self.mode,
            dtype,
        )

    def pack(self, packing: Quantization) -> Weights:
        """The module that holds this matrix packed, with its tensors declared."""
        self.group_size, self.bits, self.mode = packing.group_size, packing.bits, packing.mode
        for name, (shape, dtype) in packing.packed(self.weight.shape, "float32").items():
            self[name] = mx.zeros(shape, getattr(mx, dtype))
        self.freeze(recurse=False)  # packed codes have no gradient
        return self

    def dense(self, dtype: mx.Dtype) -> Weights:
        """The module that holds this matrix dense, in `dtype`."""
        if "scales" not in self:
            return self
        self.weight = self.matrix(dtype).take(slice(None), dtype)
        for name in ("scales", "biases"):
            self.pop(name, None)
        self.unfreeze(recurse=False)
        return self

    @property
    def inputs(self) -> int:
        """Length of a row of the dense matrix."""
        return self.matrix(mx.float32).columns

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return int(self.weight.shape[-2])

    def store_transposed(self) -> None:
        """Keep the dense weight [out, in] as a view of [in, out].

        MLX's CPU matrix product runs twice as fast on a right-hand side that lies this way.
        """
        self.weight = mx.contiguous(self.weight.swapaxes(-1, -2)).swapaxes(-1, -2)


class Linear(Weights, nn.Linear):
    """x @ weight.T, as MLX's and mlx-lm's tools for linear layers take it."""

    def pack(self, packing: Quantization) -> Weights:
        return PackedLinear(*self.weight.shape).pack(packing)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRALinear:
        """This map with a low-rank delta beside it, for mlx-lm's tuner."""
        return _lora(self, r, dropout, scale)


class PackedLinear(Weights, nn.QuantizedLinear):
    """The same of a quantized matrix."""

    def dense(self, dtype: mx.Dtype) -> Weights:
        found = Linear(0, 0)
        found.weight = self.matrix(dtype).take(slice(None), dtype)
        return found

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRALinear:
        """This map with a low-rank delta beside it, for mlx-lm's tuner."""
        return _lora(self, r, dropout, scale)


def _lora(linear: Linear | PackedLinear, r: int, dropout: float, scale: float) -> LoRALinear:
    from mlx_lm.tuner.lora import LoRALinear  # imports transformers

    lora = LoRALinear(linear.inputs, linear.outputs, r=r, dropout=dropout, scale=scale)
    lora.update_modules({"linear": linear})
    return lora


class Embedding(Weights):
    """The table [vocabulary, hidden]: input rows, output head and soft rows."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__(vocabulary, hidden)
        self._head: mx.array | None = None

    def store_transposed(self) -> None:
        """The table is also read row by row and from the left: the head gets its own copy."""
        self._head = mx.contiguous(self.weight.T)
        mx.eval(self._head)

    def rows(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """[..., hidden] in `dtype`: rows of the table, for int ids [...]."""
        return self.matrix(dtype).take(ids, dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        """[..., vocabulary] in the dtype of hidden [..., hidden]: hidden @ table.T"""
        if self._head is not None:
            return hidden @ self._head
        return self.matrix(hidden.dtype).apply(hidden, transpose=True)

    def mix(self, probabilities: mx.array) -> mx.array:
        """[..., hidden]: probabilities [..., vocabulary] @ table"""
        return self.matrix(probabilities.dtype).apply(probabilities, transpose=False)


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)); gate and up are one matrix once the model is prepared."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self._declare(hidden, width)

    def _declare(self, hidden: int, width: int) -> None:
        self.gate_proj = Linear(width, hidden)
        self.up_proj = Linear(width, hidden)
        self.down_proj = Linear(hidden, width)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., hidden], as x."""
        if "gate_up_proj" in self:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(geglu(gate, up))

    def prepare(self) -> None:
        fused = fuse([self.gate_proj, self.up_proj])
        if fused is not None:
            del self.gate_proj, self.up_proj
            self.gate_up_proj = fused


def fuse(parts: Sequence[nn.Module]) -> Weights | None:
    """One matrix whose output is the parts' outputs side by side; None when they are packed
    differently, or are no plain linear maps (a LoRA layer stands in for one). The caller drops the
    parts, so that only one copy stays in memory."""
    first = parts[0]
    if not isinstance(first, Linear | PackedLinear):
        return None
    if any(type(part) is not type(first) or set(part) != set(first) for part in parts):
        return None
    if any(isinstance(part, Weights) and part.packing != first.packing for part in parts):
        return None
    fused: Weights = Linear(0, 0)
    if first.packing is not None:
        fused = Linear(1, first.packing.group_size).pack(first.packing)
    for key in first:
        fused[key] = mx.concatenate([part[key] for part in parts], axis=0)
    mx.eval(fused.parameters())
    return fused
