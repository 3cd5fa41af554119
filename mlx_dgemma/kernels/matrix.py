"""A weight matrix as the kernels see it: dense, or quantized in any of MLX's modes."""

from dataclasses import dataclass

import mlx.core as mx

DENSE = "dense"


@dataclass(frozen=True)
class Matrix:
    """Rows of weights [..., out, in], in MLX's packing when `scales` is there."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"
    activation: mx.Dtype = mx.bfloat16  # what block-scaled modes, which store no float, compute in

    @property
    def quantized(self) -> bool:
        return self.scales is not None

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype it computes in: of the weights, of the scales, or `activation`."""
        if self.scales is None:
            return self.weight.dtype
        floats = (mx.float32, mx.float16, mx.bfloat16)
        return self.scales.dtype if self.scales.dtype in floats else self.activation

    @property
    def packing(self) -> str:
        """How shapes write it: "affine 4/64" (mode, bits, group size), or "dense"."""
        return f"{self.mode} {self.bits}/{self.group_size}" if self.quantized else DENSE

    @property
    def columns(self) -> int:
        """Length of a row after dequantization."""
        width: int = self.weight.shape[-1]
        return width * 32 // self.bits if self.quantized else width

    def widened(self) -> "Matrix":
        """The same weights, computing in float32."""
        floats = (mx.float16, mx.bfloat16)
        weight, scales, biases = (
            part.astype(mx.float32) if part is not None and part.dtype in floats else part
            for part in (self.weight, self.scales, self.biases)
        )
        assert weight is not None
        return Matrix(weight, scales, biases, self.group_size, self.bits, self.mode, mx.float32)

    def rows(self, start: int, stop: int) -> "Matrix":
        """A contiguous run of rows of a two-dimensional matrix."""
        return Matrix(
            self.weight[start:stop],
            None if self.scales is None else self.scales[start:stop],
            None if self.biases is None else self.biases[start:stop],
            self.group_size,
            self.bits,
            self.mode,
            self.activation,
        )

    def take(self, index: mx.array | slice, dtype: mx.Dtype | None = None) -> mx.array:
        """Rows [..., in] by ids or a span, dense; computed in `dtype`, by default the matrix's."""
        dtype = dtype or self.dtype
        if self.scales is None:
            return self.weight[index].astype(dtype)
        scales, biases = self.scales[index], None
        if self.biases is not None:  # affine; the other modes keep their scales in bytes
            scales, biases = scales.astype(dtype), self.biases[index].astype(dtype)
        rows: mx.array = mx.dequantize(
            self.weight[index],
            scales,
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return rows.astype(dtype)

    def apply(self, x: mx.array, *, transpose: bool) -> mx.array:
        """x @ W^T when `transpose`, else x @ W: [..., inner] to [..., outer] in the dtype of x."""
        if self.scales is None:
            return x @ (self.weight.swapaxes(-1, -2) if transpose else self.weight)
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def apply_gathered(self, rows: mx.array, experts: mx.array) -> mx.array:
        """rows[i] @ W[experts[i]]^T for ascending experts: rows [N, m, in], W [E, out, in] ->
        [N, m, out]."""
        if self.scales is None:
            return mx.gather_mm(
                rows, self.weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=True
            )
        return mx.gather_qmm(
            rows,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=True,
        )
