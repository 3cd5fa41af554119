"""The residual stream between attention and the two branches, and after them: norms and sums.

    r = x + norm(mixed);  norm_1(r), norm_2(r), norm(r) * scale * hidden^-0.5     after attention
    (r + norm(norm_1(dense) + norm_2(sparse))) * scalar                           after the branches

Every norm is an RMSNorm; each result is rounded to the stream's dtype, as the operations one by one
round it. As kernels, a row is read once and what comes of it is written once.

Metal kernels: checked by emulation on Linux; not yet run on Apple hardware.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, TypedDict

import mlx.core as mx

from mlx_dgemma.kernels import dispatch, gradients, registry
from mlx_dgemma.kernels.gradients import rms_norm
from mlx_dgemma.kernels.router import scaled_norm
from mlx_dgemma.kernels.samples import dtype_named


class Attended(NamedTuple):
    """residual [T, H] in the stream's dtype; what the dense branch, the experts and the router's
    projection read of it, [T, H] in the activations' dtype."""

    residual: mx.array
    dense: mx.array
    experts: mx.array
    router: mx.array


class Norms(NamedTuple):
    """Weights [H]: of the attention's output, the two branches' inputs, and the router's scale."""

    attention: mx.array
    dense: mx.array
    experts: mx.array
    router: mx.array


class BranchNorms(NamedTuple):
    """Weights [H]: of the branches' outputs, and of their sum."""

    dense: mx.array
    experts: mx.array
    both: mx.array


class Epsilons(NamedTuple):
    """Of the norm of the branches' sum, and of the norms of the branches' outputs, which may come
    in a larger unit (see model.float16)."""

    both: float
    branches: float


def after_attention(x: mx.array, mixed: mx.array, norms: Norms, eps: float) -> Attended:
    """x [T, H] is the stream, mixed [T, H] the attention's output in the activations' dtype."""
    use = dispatch.use(ATTENDED, x.dtype, mixed.dtype, x.shape[0], x.shape[1])
    return (attended_metal if use else attended_twin)(x, mixed, norms, eps)


def after_branches(
    residual: mx.array,
    dense: mx.array,
    experts: mx.array,
    norms: BranchNorms,
    scalar: mx.array,
    eps: Epsilons,
) -> mx.array:
    """The stream [T, H] after a layer; scalar [1]; dense, experts [T, H], of activations."""
    use = dispatch.use(BRANCHES, residual.dtype, dense.dtype, residual.shape[0], residual.shape[1])
    return (branches_metal if use else branches_twin)(residual, dense, experts, norms, scalar, eps)


def attended_twin(x: mx.array, mixed: mx.array, norms: Norms, eps: float) -> Attended:
    """The same in plain MLX operations."""
    dtype = mixed.dtype
    residual = x + rms_norm(mixed.astype(x.dtype), norms.attention, eps)
    if gradients.by_hand():  # one norm for the three
        unit = rms_norm(residual, None, eps)
        weights = norms.dense, norms.experts, norms.router * x.shape[-1] ** -0.5
        return Attended(residual, *((unit * weight).astype(dtype) for weight in weights))
    return Attended(
        residual,
        rms_norm(residual, norms.dense, eps).astype(dtype),
        rms_norm(residual, norms.experts, eps).astype(dtype),
        scaled_norm(residual, norms.router, eps).astype(dtype),
    )


def branches_twin(
    residual: mx.array,
    dense: mx.array,
    experts: mx.array,
    norms: BranchNorms,
    scalar: mx.array,
    eps: Epsilons,
) -> mx.array:
    """The same in plain MLX operations."""
    wide = residual.dtype
    both = rms_norm(dense.astype(wide), norms.dense, eps.branches)
    both = both + rms_norm(experts.astype(wide), norms.experts, eps.branches)
    return (residual + rms_norm(both, norms.both, eps.both)) * scalar


_THREADS = 256
_ATTENDED = registry.Kernel(
    "after_attention",
    inputs=("x", "mixed", "attention", "dense", "experts", "router", "settings"),
    outputs=("residual", "dense_input", "experts_input", "router_input"),
)
_BRANCHES = registry.Kernel(
    "after_branches",
    inputs=("residual", "dense", "experts", "w_dense", "w_experts", "w_both", "scalar", "settings"),
    outputs=("y",),
)


def attended_metal(x: mx.array, mixed: mx.array, norms: Norms, eps: float) -> Attended:
    """The same as one Metal kernel, a threadgroup per row."""
    rows, hidden = x.shape
    outputs = registry.launch(
        _ATTENDED,
        [x, mixed, *norms, mx.array([eps, hidden**-0.5], dtype=mx.float32)],
        outputs=[((rows, hidden), x.dtype), *[((rows, hidden), mixed.dtype)] * 3],
        **_a_row_each(x, mixed.dtype),
    )
    return Attended(*outputs)


def branches_metal(
    residual: mx.array,
    dense: mx.array,
    experts: mx.array,
    norms: BranchNorms,
    scalar: mx.array,
    eps: Epsilons,
) -> mx.array:
    """The same as one Metal kernel, a threadgroup per row."""
    return registry.launch(
        _BRANCHES,
        [residual, dense, experts, *norms, scalar, mx.array(eps, dtype=mx.float32)],
        outputs=[(residual.shape, residual.dtype)],
        **_a_row_each(residual, dense.dtype),
    )[0]


class _Launch(TypedDict):
    template: registry.Template
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


def _a_row_each(stream: mx.array, activation: mx.Dtype) -> _Launch:
    rows, hidden = stream.shape
    return {
        "template": [
            ("R", stream.dtype),
            ("T", activation),
            ("TG", _THREADS),
            ("PER", -(-hidden // _THREADS)),
        ],
        "grid": (_THREADS, rows, 1),
        "threadgroup": (_THREADS, 1, 1),
    }


def _supports(shape: registry.Shape) -> bool:
    floats = registry.is_float(shape) and registry.is_float(shape, "stream")
    return floats and int(shape["tokens"]) > 0 and 0 < int(shape["hidden"]) <= 32 * _THREADS


_TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
_EPS = 1e-6
_APART = Epsilons(2.0, 5.0)  # so large that exchanging them shows


def _samples(shape: registry.Shape) -> Iterator[tuple[list[mx.array], list[mx.array], float]]:
    """(arrays in the stream's or the activations' dtype, weights, tolerance)."""
    stream, dtype = dtype_named(shape["stream"]), dtype_named(shape["dtype"])
    hidden = int(shape["hidden"])
    for tokens in (1, 3, int(shape["tokens"])):
        keys = mx.random.split(mx.random.key(tokens), 7)
        arrays = [mx.random.normal((tokens, hidden), key=keys[i]) * 3 for i in range(3)]
        arrays = [arrays[0].astype(stream), *(one.astype(dtype) for one in arrays[1:])]
        weights = [
            mx.random.uniform(0.5, 1.5, (hidden,), key=key).astype(stream) for key in keys[3:]
        ]
        mx.eval(arrays, weights)  # else they would be timed with the kernel and with its twin
        yield arrays, weights, _TOLERANCE[str(shape["dtype"])]


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def _attended_probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    for (x, mixed, _), weights, tolerance in _samples(shape):
        norms, wide = Norms(*weights), Norms(*map(_wide, weights))
        yield registry.Probe(
            partial(attended_metal, x, mixed, norms, _EPS),
            partial(attended_twin, x, mixed, norms, _EPS),
            tolerance=tolerance,
            expected=partial(attended_twin, _wide(x), _wide(mixed), wide, _EPS),
        )


def _branches_probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    for (x, dense, experts), (*some, last), tolerance in _samples(shape):
        norms, wide, scalar = BranchNorms(*some), BranchNorms(*map(_wide, some)), last[:1]
        mx.eval(scalar)
        yield registry.Probe(
            partial(branches_metal, x, dense, experts, norms, scalar, _APART),
            partial(branches_twin, x, dense, experts, norms, scalar, _APART),
            tolerance=tolerance,
            expected=partial(
                branches_twin, _wide(x), _wide(dense), _wide(experts), wide, _wide(scalar), _APART
            ),
        )


_SIZES = ("stream", "dtype", "tokens", "hidden")
ATTENDED = registry.Operation("after_attention", _SIZES, (_ATTENDED,), _supports, _attended_probes)
BRANCHES = registry.Operation("after_branches", _SIZES, (_BRANCHES,), _supports, _branches_probes)
