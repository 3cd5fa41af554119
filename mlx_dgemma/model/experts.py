"""The mixture of experts: an exact router, and expert matrices read in sorted order."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma import kernels
from mlx_dgemma.model.config import TextConfig
from mlx_dgemma.model.layers import Linear, Matrix, gated_gelu


class Router(nn.Module):
    """Chooses `top_k` experts per position from the raw residual stream."""

    def __init__(self, text: TextConfig, dtype: mx.Dtype):
        super().__init__()
        self.dtype = dtype
        self.eps = text.rms_norm_eps
        self.top_k = text.top_k_experts
        self.root = text.hidden_size**-0.5
        self.proj = Linear()

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [T, H] -> (experts int32 [T, K], weights float32 [T, K])."""
        normed = mx.fast.rms_norm(x, None, self.eps) * self.scale * self.root
        return route(self._scores(normed), self.per_expert_scale, self.top_k)

    def fused(self, x: mx.array) -> kernels.Routing:
        """The same by the fused operations, with the choices sorted for the experts."""
        return kernels.route(
            x, self.scale, self._scores, self.per_expert_scale, self.top_k, eps=self.eps
        )

    def _scores(self, normed: mx.array) -> mx.array:
        return self.proj(normed.astype(self.dtype))


def route(scores: mx.array, per_expert_scale: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
    """The `top_k` best scores [T, E] and their softmax weights times the expert's scale.

    Ties go to the lowest index on every backend, because the order is that of (score, index).
    Softmax over the chosen equals softmax over all, renormalised.
    """
    scores = scores.astype(mx.float32)
    experts = top_indices(scores, top_k)
    weights = mx.softmax(mx.take_along_axis(scores, experts, axis=-1), axis=-1)
    return experts, weights * per_expert_scale[experts].astype(mx.float32)


def top_indices(scores: mx.array, count: int) -> mx.array:
    """int32 [..., count]: the best of float32 scores, best first, ties to the lowest index.

    A float's bits, with the magnitude flipped for negative numbers, order like the float; with
    the index in the low half one integer sort decides everything, stable or not.
    """
    bits = (scores + 0.0).view(mx.int32)  # adding zero turns -0.0 into 0.0
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    index = mx.arange(scores.shape[-1], dtype=mx.int64)
    keys = mx.sort((-ordered) * (1 << 32) + index, axis=-1)[..., :count]
    return (keys & 0xFFFFFFFF).astype(mx.int32)


class ExpertMatrix(Matrix):
    """One matrix per expert, [E, out, in]."""

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [N, 1, in] through the matrix of experts [N], which must ascend -> [N, 1, out]."""
        if self.quantized:
            return mx.gather_qmm(
                x,
                self.weight,
                self.scales,
                self.get("biases"),
                rhs_indices=experts,
                transpose=True,
                sorted_indices=True,
                **self._packed(),
            )
        return mx.gather_mm(
            x, self.weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=True
        )


class Experts(nn.Module):
    """down(gelu(gate) * up) of the chosen experts, summed with their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = ExpertMatrix()
        self.down_proj = ExpertMatrix()

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """x [T, H], experts and weights [T, K] -> [T, H]."""
        order, sorted_experts = by_expert(experts)
        rows = x[order // experts.shape[-1]][:, None, :]
        hidden = gated_gelu(self.gate_up_proj(rows, sorted_experts))
        outputs = self.down_proj(hidden, sorted_experts)[:, 0, :]
        return combine(outputs, order, weights).astype(x.dtype)

    def fused(self, x: mx.array, routing: kernels.Routing) -> mx.array:
        """The same by the fused operations."""
        return kernels.moe(
            x, routing, self.gate_up_proj.as_kernels(x.dtype), self.down_proj.as_kernels(x.dtype)
        )


def by_expert(experts: mx.array) -> tuple[mx.array, mx.array]:
    """(order, experts in that order): the [T, K] choices sorted by expert, then by position.

    The position rides in the key, so that the order does not depend on the sort's stability.
    """
    flat = experts.reshape(-1).astype(mx.int32)
    count = flat.size
    keys = mx.sort(flat * count + mx.arange(count, dtype=mx.int32))
    return keys % count, keys // count


def combine(outputs: mx.array, order: mx.array, weights: mx.array) -> mx.array:
    """Undo the sort of outputs [T * K, H] and sum each position's K rows, weighted, in float32."""
    rows = outputs[mx.argsort(order)].reshape(*weights.shape, -1)
    return (rows * weights[..., None]).sum(axis=-2)
