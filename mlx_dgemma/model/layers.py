"""The small parts: linear maps and embeddings, dense or quantized, norms and the gated MLP.

A module holds its tensors under the checkpoint's names (`weight`, `scales`, `biases`) and is
empty until the loader fills it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma import kernels
from mlx_dgemma.kernels.moe import geglu
from mlx_dgemma.model.names import Quantization


class Matrix(nn.Module):
    """A matrix [..., out, in], dense or packed; `packing` says how."""

    def __init__(self) -> None:
        super().__init__()
        self.packing: Quantization | None = None

    @property
    def quantized(self) -> bool:
        return "scales" in self

    def as_kernels(self, dtype: mx.Dtype) -> kernels.Matrix:
        """The matrix as the fused operations take it, computing in `dtype`."""
        if self.packing is None or not self.quantized:
            return kernels.Matrix(self.weight)
        return kernels.Matrix(
            self.weight, self.scales, self.get("biases"), **self._packed(), activation=dtype
        )

    def _packed(self) -> dict:
        packing = self.packing
        assert packing is not None
        return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}

    def product(self, x: mx.array, *, transpose: bool) -> mx.array:
        """x @ W.T for W [out, in] where `transpose`, else x @ W."""
        if self.quantized:
            return mx.quantized_matmul(
                x,
                self.weight,
                self.scales,
                self.get("biases"),
                transpose=transpose,
                **self._packed(),
            )
        return x @ (self.weight.T if transpose else self.weight)

    def dequantize(self, dtype: mx.Dtype) -> None:
        """Replace the packed tensors by one dense weight."""
        self["weight"] = self.rows(slice(None), dtype)
        for key in ("scales", "biases"):
            self.pop(key, None)
        self.packing = None

    def rows(self, index: mx.array | slice, dtype: mx.Dtype) -> mx.array:
        """Rows of the matrix, dense in `dtype`, in which they are also dequantized."""
        if not self.quantized:
            return self.weight[index].astype(dtype)
        scales, biases = self.scales[index], self.get("biases")
        if biases is not None:  # affine; the other modes keep their scales in bytes
            scales, biases = scales.astype(dtype), biases[index].astype(dtype)
        dense = mx.dequantize(self.weight[index], scales, biases, **self._packed())
        return dense.astype(dtype)

    def store_transposed(self) -> None:
        """Keep the dense weight [out, in] as a view of [in, out].

        MLX's CPU matrix product runs twice as fast on a right-hand side that lies this way.
        """
        self["weight"] = mx.contiguous(self["weight"].swapaxes(-1, -2)).swapaxes(-1, -2)


class Linear(Matrix):
    """x @ weight.T"""

    def __call__(self, x: mx.array) -> mx.array:
        return self.product(x, transpose=True)


class Embedding(Matrix):
    """The table [vocabulary, hidden]: input rows, output head and soft rows."""

    def __init__(self) -> None:
        super().__init__()
        self._head: mx.array | None = None

    def store_transposed(self) -> None:
        """The table is also read row by row and from the left: the head gets its own copy."""
        self._head = mx.contiguous(self.weight.T)
        mx.eval(self._head)

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden @ table.T"""
        if self._head is not None:
            return hidden @ self._head
        return self.product(hidden, transpose=True)

    def mix(self, probabilities: mx.array) -> mx.array:
        """probabilities @ table"""
        return self.product(probabilities, transpose=False)


class RMSNorm(nn.Module):
    """weight * x / rms(x)"""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)); gate and up are one matrix once the model is prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = Linear()
        self.up_proj = Linear()
        self.down_proj = Linear()

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            return self.down_proj(gated_gelu(self.gate_up_proj(x)))
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))

    def prepare(self) -> None:
        fused = fuse([self.gate_proj, self.up_proj])
        if fused is not None:
            del self.gate_proj, self.up_proj
            self.gate_up_proj = fused


def gated_gelu(gate_up: mx.array) -> mx.array:
    """gelu(gate) * up of a tensor [..., 2 * width] that holds gate first."""
    gate, up = mx.split(gate_up, 2, axis=-1)
    return geglu(gate, up)


def fuse(parts: Sequence[Linear]) -> Linear | None:
    """One matrix whose output is the parts' outputs side by side; None when they are packed
    differently. The caller drops the parts, so that only one copy stays in memory."""
    if any(part.packing != parts[0].packing for part in parts):
        return None
    if any(set(part) != set(parts[0]) for part in parts):
        return None
    fused = Linear()
    fused.packing = parts[0].packing
    for key in parts[0]:
        fused[key] = mx.concatenate([part[key] for part in parts], axis=0)
    mx.eval(fused.parameters())
    return fused
