"""The mixture of experts: an exact router, and expert matrices read in sorted order."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma import kernels
from mlx_dgemma.distributed.team import Team
from mlx_dgemma.model.config import TextConfig
from mlx_dgemma.model.layers import Linear, Weights


class Router(nn.Module):
    """Chooses `top_k` experts per position from the raw residual stream, normed and scaled."""

    def __init__(self, text: TextConfig, dtype: mx.Dtype):
        super().__init__()
        self.dtype = dtype
        self.top_k = text.top_k_experts
        self.proj = Linear(text.num_experts, text.hidden_size)
        self.scale = mx.zeros((text.hidden_size,))
        self.per_expert_scale = mx.zeros((text.num_experts,))

    def __call__(self, normed: mx.array, team: Team | None = None) -> kernels.Routing:
        """The experts of positions [T, H], their weights, and the pairs sorted by expert.

        team: those who compute the experts together. Where their chips may round otherwise, all
        choose by rank 0's scores.
        """
        scores = self.proj(normed)
        if team is not None and team.unequal:
            scores = team.share(scores)
        return kernels.choose_experts(scores, self.per_expert_scale, self.top_k)


class Experts(nn.Module):
    """down(gelu(gate) * up) of the chosen experts, summed with their weights.

    Each matrix is [experts, out, in].
    """

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        experts, hidden, width = text.num_experts, text.hidden_size, text.moe_intermediate_size
        self.gate_up_proj = Weights(experts, 2 * width, hidden)
        self.down_proj = Weights(experts, hidden, width)

    def __call__(self, x: mx.array, routing: kernels.Routing) -> mx.array:
        """x [T, H] -> [T, H] in the same dtype."""
        gate_up, down = self.gate_up_proj.matrix(x.dtype), self.down_proj.matrix(x.dtype)
        return kernels.moe(x, routing, gate_up, down)
