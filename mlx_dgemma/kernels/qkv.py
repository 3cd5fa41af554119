"""Queries, keys and values between projection and attention: norm, rope, heads first.

Queries and keys take RMSNorm with weight, then rope; values take RMSNorm without weight and no
rope. Rope turns the pairs (i, i + head_dim / 2) by tables of cosine and sine in the activation
dtype.

Metal kernels: checked by emulation on Linux; not yet run on Apple hardware.
"""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from mlx_dgemma.kernels import dispatch, gradients, registry
from mlx_dgemma.kernels.samples import dtype_named

Rope = tuple[mx.array, mx.array]


def normed_heads(x: mx.array, weight: mx.array | None, rope: Rope | None, eps: float) -> mx.array:
    """RMSNorm and rope of x [B, L, heads, head_dim], heads first: [B, heads, L, head_dim].

    `weight` [head_dim] or None; `rope` is (cosine, sine), each [L, head_dim / 2], or None.
    """
    _, length, heads, head_dim = x.shape
    sizes = (x.dtype, length, heads, head_dim, int(rope is not None))
    run = metal if dispatch.use(OPERATION, *sizes) else twin
    return run(x, weight, rope, eps)


def twin(x: mx.array, weight: mx.array | None, rope: Rope | None, eps: float) -> mx.array:
    """The same in plain MLX operations."""
    normed = gradients.rms_norm(x, weight, eps)
    if rope is not None and gradients.by_hand():
        return gradients.rotate(normed, rope).swapaxes(1, 2)
    normed = normed.swapaxes(1, 2)
    return normed if rope is None else rotate(normed, rope)


def rotate(x: mx.array, rope: Rope) -> mx.array:
    """Turns the pairs (i, i + D/2) of x [..., L, D] by cosine and sine, [L, D/2] each."""
    cosine, sine = rope
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


_HEADS_PER_GROUP = 4
_KERNEL = registry.Kernel(
    "normed_heads",
    inputs=("x", "weight", "cosine", "sine", "eps"),
    outputs=("y",),
    contiguous=False,
)


def _supports(shape: registry.Shape) -> bool:
    some = int(shape["length"]) > 0 and int(shape["heads"]) > 0
    return registry.is_float(shape) and some and int(shape["head_dim"]) in range(64, 513, 64)


def metal(x: mx.array, weight: mx.array | None, rope: Rope | None, eps: float) -> mx.array:
    """The same as one Metal kernel, a SIMD-group per head and position."""
    batch, length, heads, head_dim = x.shape
    cosine, sine = (x, x) if rope is None else (mx.contiguous(part) for part in rope)
    return registry.launch(
        _KERNEL,
        [
            x,
            x if weight is None else mx.contiguous(weight),
            cosine,
            sine,
            mx.array([eps], dtype=mx.float32),
        ],
        template=[
            ("T", x.dtype),
            ("D", head_dim),
            ("HAS_WEIGHT", weight is not None),
            ("HAS_ROPE", rope is not None),
        ],
        grid=(32, heads, batch * length),
        threadgroup=(32, min(_HEADS_PER_GROUP, heads), 1),
        outputs=[((batch, heads, length, head_dim), x.dtype)],
    )[0]


def _probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    dtype = dtype_named(shape["dtype"])
    head_dim, tolerance = int(shape["head_dim"]), 1e-4 if dtype == mx.float32 else 2e-2
    for length, heads in ((1, 1), (3, 5), (int(shape["length"]), int(shape["heads"]))):
        joint = mx.random.normal((1, length, 2 * heads, head_dim), key=mx.random.key(length))
        x = joint.astype(dtype)[:, :, heads:]  # a part of a joint projection
        angles = mx.arange(length * head_dim // 2).reshape(length, -1) / 64.0
        rope = (mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype))
        weight = mx.random.normal((head_dim,), key=mx.random.key(1)).astype(dtype)
        gain, tables = (weight, rope) if shape["rope"] else (None, None)
        wide_gain = None if gain is None else gain.astype(mx.float32)
        wide_tables = None
        if tables is not None:
            wide_tables = tables[0].astype(mx.float32), tables[1].astype(mx.float32)
        yield registry.Probe(
            partial(metal, x, gain, tables, 1e-6),
            partial(twin, x, gain, tables, 1e-6),
            tolerance,
            expected=partial(twin, x.astype(mx.float32), wide_gain, wide_tables, 1e-6),
        )


OPERATION = registry.Operation(
    "normed_heads",
    ("dtype", "length", "heads", "head_dim", "rope"),
    (_KERNEL,),
    _supports,
    _probes,
)
