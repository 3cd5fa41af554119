"""Low-rank deltas beside weights, and layers of which each pass has its own.

Both passes share every text weight, but an adapter may change one pass alone, or each in its
own way: the decoder runs the model's layers, and the encoder then runs views of them, which hold
the same weights beside other deltas.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma.kernels.matrix import Matrix
from mlx_dgemma.kernels.moe import twin as moe
from mlx_dgemma.kernels.router import Routing
from mlx_dgemma.model.experts import Experts
from mlx_dgemma.model.network import Layer, Model


@dataclass(frozen=True)
class Factors:
    """scale * (a @ b).T of a weight [out, in]: a [in, r], b [r, out]; with experts first, of
    weights [E, out, in]: a [E, in, r], b [E, r, out]."""

    a: mx.array
    b: mx.array
    scale: float


class LowRank(nn.Module):
    """linear(x) + (x @ a * scale) @ b"""

    def __init__(self, linear: nn.Module, parts: Sequence[tuple[int, Factors]], outputs: int):
        """parts: where in the linear map's outputs each delta begins, and the delta."""
        super().__init__()
        self.linear = linear
        self.lora_a = mx.concatenate([factors.a for _, factors in parts], axis=1)
        rows = []
        for start, factors in parts:
            after = outputs - start - factors.b.shape[1]
            rows.append(mx.pad(factors.b, ((0, 0), (start, after))))
        self.lora_b = mx.concatenate(rows)
        ranks = [mx.full((factors.b.shape[0],), factors.scale) for _, factors in parts]
        self.lora_scale = mx.concatenate(ranks)
        mx.eval(self.lora_a, self.lora_b, self.lora_scale)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., out] of x [..., in], in the dtype that the linear map gives."""
        y = self.linear(x)
        inner = (x @ self.lora_a) * self.lora_scale
        return y + (inner.astype(self.lora_b.dtype) @ self.lora_b).astype(y.dtype)


@dataclass(frozen=True)
class LowRankMatrix(Matrix):
    """Expert matrices [E, out, in] with a delta each."""

    delta: Factors | None = None

    def apply_gathered(self, x: mx.array, ids: mx.array) -> mx.array:
        y = super().apply_gathered(x, ids)
        if self.delta is None:
            return y
        a, b = self.delta.a, self.delta.b
        inner = mx.gather_mm(x.astype(a.dtype), a, rhs_indices=ids, sorted_indices=True)
        outer = mx.gather_mm(inner * self.delta.scale, b, rhs_indices=ids, sorted_indices=True)
        return y + outer.astype(y.dtype)


class LowRankExperts(nn.Module):
    """Experts whose matrices have deltas; gate_up, down: None where there is none."""

    def __init__(self, experts: Experts, gate_up: Factors | None, down: Factors | None):
        super().__init__()
        self.experts = experts
        self.gate_up, self.down = _held(gate_up), _held(down)

    def __call__(self, x: mx.array, routing: Routing) -> mx.array:
        """x [T, H] -> [T, H] in the same dtype, in plain MLX operations."""
        gate_up = _with_delta(self.experts.gate_up_proj.matrix(x.dtype), self.gate_up)
        return moe(x, routing, gate_up, _with_delta(self.experts.down_proj.matrix(x.dtype), self.down))


def _held(factors: Factors | None) -> dict[str, mx.array] | None:
    """As a module keeps them, so that they count among its parameters."""
    if factors is None:
        return None
    return {"lora_a": factors.a, "lora_b": factors.b, "lora_scale": mx.array(factors.scale)}


def _with_delta(matrix: Matrix, held: dict[str, mx.array] | None) -> Matrix:
    delta = None
    if held is not None:
        delta = Factors(held["lora_a"], held["lora_b"], 1.0)
    return LowRankMatrix(**vars(matrix), delta=delta)


# Module of a layer -> the matrix that holds it once the model is prepared, in what order.
_JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def attach(
    model: Model, encoder: dict[str, Factors], decoder: dict[str, Factors], *, shared: bool
) -> None:
    """Puts deltas beside the weights of a filled model, prepared or not.

    encoder, decoder: by module name in the checkpoint's layout, with the decoder's name for what
    both passes share. shared: both passes have the same deltas of what they share.
    """
