"""The router: which experts see a token, with what weight, and the rows sorted for the experts.

Scores are proj(RMSNorm(x) * scale * hidden^-0.5) of the raw residual. The top k experts are those
of the highest score, the lowest index first on ties; softmax over the chosen k in float32 equals
softmax over all, renormalised. A counting sort then lines up the (token, choice) pairs by expert,
in token order inside an expert, so that an expert's rows are one contiguous run.

Metal kernels: checked by emulation on Linux; not yet run on Apple hardware.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_dgemma.kernels import dispatch, registry
from mlx_dgemma.kernels.samples import dtype_named


class Routing(NamedTuple):
    """T tokens, k choices each, E experts; N = T * k pairs, pair n belongs to token n // k."""

    experts: mx.array  # [T, k] int32, highest score first
    weights: mx.array  # [T, k] float32, per-expert scale included
    order: mx.array  # [N] int32: pairs in ascending order of expert, then of pair
    places: mx.array  # [N] int32: where each pair stands in `order`
    offsets: mx.array  # [E + 1] int32: expert e owns order[offsets[e] : offsets[e + 1]]


def scaled_norm(x: mx.array, scale: mx.array, eps: float) -> mx.array:
    """RMSNorm of x [n, hidden] without weight, times scale [hidden], times hidden^-0.5."""
    root: float = x.shape[-1] ** -0.5
    return mx.fast.rms_norm(x, None, eps) * scale * root


def choose_experts(scores: mx.array, per_expert_scale: mx.array, top_k: int) -> Routing:
    """Top k, softmax and counting sort from scores [T, E], any float dtype."""
    tokens, count = scores.shape
    run = metal if dispatch.use(OPERATION, scores.dtype, tokens, count, top_k) else twin
    return run(scores, per_expert_scale, top_k)


def twin(scores: mx.array, per_expert_scale: mx.array, top_k: int) -> Routing:
    """The same in plain MLX operations, every sort on keys that cannot tie.

    The choice is a constant to gradients, which flow through the weights alone.
    """
    tokens, count = scores.shape
    values = scores.astype(mx.float32)
    keys = _ascending_bits(mx.stop_gradient(values)).astype(mx.int64) * count - mx.arange(
        count, dtype=mx.int64
    )
    experts = mx.argsort(-keys, axis=1)[:, :top_k].astype(mx.int32)
    chosen = mx.take_along_axis(values, experts, axis=1)
    weights = mx.softmax(chosen, axis=1) * per_expert_scale.astype(mx.float32)[experts]

    pairs = tokens * top_k
    flat = experts.reshape(-1)
    order = mx.argsort(flat * pairs + mx.arange(pairs, dtype=mx.int32)).astype(mx.int32)
    places = mx.put_along_axis(
        mx.zeros_like(order), order, mx.arange(pairs, dtype=mx.int32), axis=0
    )
    sizes = (flat[:, None] == mx.arange(count, dtype=mx.int32)).astype(mx.int32).sum(axis=0)
    offsets = mx.concatenate([mx.zeros((1,), dtype=mx.int32), mx.cumsum(sizes).astype(mx.int32)])
    return Routing(experts, weights, order, places, offsets)


def _ascending_bits(values: mx.array) -> mx.array:
    """int32 keys in the order of float32 values, zero equal to minus zero."""
    bits = (values + 0.0).view(mx.int32)
    return mx.where(bits < 0, mx.array(-(2**31), dtype=mx.int32) - bits, bits)


_MOST_PAIRS = 8192  # staged in threadgroup memory, two bytes each
_TOP = registry.Kernel(
    "top_experts", inputs=("scores", "per_expert"), outputs=("experts", "weights")
)
_SORT = registry.Kernel(
    "sort_by_expert", inputs=("pairs", "per_expert"), outputs=("order", "places", "offsets")
)


def _supports(shape: registry.Shape) -> bool:
    tokens, count, top_k = (int(shape[name]) for name in ("tokens", "experts", "top_k"))
    fits = 0 < top_k <= count <= 512 and 0 < tokens * top_k <= _MOST_PAIRS
    return registry.is_float(shape) and fits


def metal(scores: mx.array, per_expert_scale: mx.array, top_k: int) -> Routing:
    """The same as two Metal kernels: top k with softmax, and a counting sort."""
    tokens, count = scores.shape
    experts, weights = registry.launch(
        _TOP,
        [scores, per_expert_scale],
        template=[("T", scores.dtype), ("EXPERTS", count), ("TOP_K", top_k)],
        grid=(32, tokens, 1),
        threadgroup=(32, 1, 1),
        outputs=[((tokens, top_k), mx.int32), ((tokens, top_k), mx.float32)],
    )
    pairs = tokens * top_k
    threads = -(-count // 32) * 32
    staged = next(size for size in (2048, 4096, _MOST_PAIRS) if pairs <= size)
    order, places, offsets = registry.launch(
        _SORT,
        [experts.reshape(-1), per_expert_scale],
        template=[("PAIRS", staged), ("TG", threads)],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        outputs=[((pairs,), mx.int32), ((pairs,), mx.int32), ((count + 1,), mx.int32)],
    )
    return Routing(experts, weights, order, places, offsets)


def _probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    dtype = dtype_named(shape["dtype"])
    count, top_k = int(shape["experts"]), int(shape["top_k"])
    per_expert = mx.random.uniform(0.5, 1.5, (count,), key=mx.random.key(0))
    for tokens in (1, 9, int(shape["tokens"])):
        scores = mx.random.normal((tokens, count), key=mx.random.key(tokens))
        scores = (mx.round(scores * 4) / 4).astype(dtype)  # many ties
        yield registry.Probe(
            metal=partial(metal, scores, per_expert, top_k),
            twin=partial(twin, scores, per_expert, top_k),
            tolerance=1e-5,
        )


OPERATION = registry.Operation(
    "router", ("dtype", "tokens", "experts", "top_k"), (_TOP, _SORT), _supports, _probes
)
