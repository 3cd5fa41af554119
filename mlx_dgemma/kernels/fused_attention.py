"""Attention over all keys at once by MLX's own fused kernel, where it has one for the head size.

Its scores never lie in memory: of a picture of 2,520 patches they are 203 MB a layer in 16 bits.
The twin is two products around a softmax. Nothing of this is a kernel of this package, so there is
nothing to emulate; whether it wins on a machine is found out there as it is for the others.

Of 256, the other head size in question, MLX has a fused kernel too, and its own choice is not to
take it for more than 8 queries, being slower (mlx/backend/metal/scaled_dot_product_attention.cpp).
"""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from mlx_dgemma.kernels import registry
from mlx_dgemma.kernels.samples import dtype_named

_HEAD_DIMS = (64, 72, 80, 96, 128)
_LEAST = 9  # queries; for fewer MLX has another kernel, of other sizes


def fused(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """softmax(q k^T) v without a scale: [B, heads, L, D] each -> [B, heads, L, D]."""
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0)


def twin(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """The same in plain MLX operations."""
    return mx.softmax(queries @ keys.swapaxes(-1, -2), axis=-1, precise=True) @ values


def _supports(shape: registry.Shape) -> bool:
    return (
        registry.is_float(shape)
        and int(shape["patches"]) >= _LEAST
        and int(shape["head_dim"]) in _HEAD_DIMS
    )


_TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


def _probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    dtype, heads = dtype_named(shape["dtype"]), int(shape["heads"])
    head_dim, most = int(shape["head_dim"]), int(shape["patches"])
    for patches in (_LEAST, 63, most):
        keys = mx.random.split(mx.random.key(patches), 3)
        # Norms make queries and keys of unit mean square; a weight makes their products moderate.
        given = [mx.random.normal((1, heads, patches, head_dim), key=key) for key in keys]
        given[0] = given[0] / head_dim**0.5 * 2
        given = [one.astype(dtype) for one in given]
        mx.eval(given)  # else they would be timed too
        yield registry.Probe(
            partial(fused, *given),
            partial(twin, *given),
            _TOLERANCE[str(shape["dtype"])],
            expected=partial(twin, *(one.astype(mx.float32) for one in given)),
        )


OPERATION = registry.Operation(
    "fused_attention", ("dtype", "patches", "heads", "head_dim"), (), _supports, _probes
)
