"""The router: which experts see a token, with what weight, and the rows sorted for the experts.

Scores are proj(RMSNorm(x) * scale * hidden^-0.5) of the raw residual. The top k experts are those
of the highest score, the lowest index first on ties; softmax over the chosen k in float32 equals
softmax over all, renormalised. A counting sort then lines up the (token, choice) pairs by expert,
in token order inside an expert, so that an expert's rows are one contiguous run.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx


class Routing(NamedTuple):
    """T tokens, k choices each, E experts; N = T * k pairs, pair n belongs to token n // k."""

    experts: mx.array  # [T, k] int32, highest score first
    weights: mx.array  # [T, k] float32, per-expert scale included
    order: mx.array  # [N] int32: pairs in ascending order of expert, then of pair
    offsets: mx.array  # [E + 1] int32: expert e owns order[offsets[e] : offsets[e + 1]]


def route(
    x: mx.array,
    scale: mx.array,
    projection: Callable[[mx.array], mx.array],
    per_expert_scale: mx.array,
    top_k: int,
    *,
    eps: float = 1e-6,
) -> Routing:
    """Routing of the raw residual x [T, H]; `projection` maps [T, H] to scores [T, E]."""
    return choose_experts(projection(scaled_norm(x, scale, eps)), per_expert_scale, top_k)


def scaled_norm(x: mx.array, scale: mx.array, eps: float) -> mx.array:
    """RMSNorm without weight, times scale, times hidden^-0.5."""
    return mx.fast.rms_norm(x, None, eps) * scale * x.shape[-1] ** -0.5


def choose_experts(scores: mx.array, per_expert_scale: mx.array, top_k: int) -> Routing:
    """Top k, softmax and counting sort from scores [T, E], any float dtype."""
    return twin(scores, per_expert_scale, top_k)


def twin(scores: mx.array, per_expert_scale: mx.array, top_k: int) -> Routing:
    """The same in plain MLX operations, every sort on keys that cannot tie."""
    tokens, count = scores.shape
    values = scores.astype(mx.float32)
    keys = _ascending_bits(values).astype(mx.int64) * count - mx.arange(count, dtype=mx.int64)
    experts = mx.argsort(-keys, axis=1)[:, :top_k].astype(mx.int32)
    chosen = mx.take_along_axis(values, experts, axis=1)
    weights = mx.softmax(chosen, axis=1) * per_expert_scale.astype(mx.float32)[experts]

    pairs = tokens * top_k
    flat = experts.reshape(-1)
    order = mx.argsort(flat * pairs + mx.arange(pairs, dtype=mx.int32)).astype(mx.int32)
    sizes = (flat[:, None] == mx.arange(count, dtype=mx.int32)).astype(mx.int32).sum(axis=0)
    offsets = mx.concatenate([mx.zeros((1,), dtype=mx.int32), mx.cumsum(sizes).astype(mx.int32)])
    return Routing(experts, weights, order, offsets)


def _ascending_bits(values: mx.array) -> mx.array:
    """int32 keys in the order of float32 values, zero and minus zero alike."""
    bits = (values + 0.0).view(mx.int32)
    return mx.where(bits < 0, mx.array(-(2**31), dtype=mx.int32) - bits, bits)
