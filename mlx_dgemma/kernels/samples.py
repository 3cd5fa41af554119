"""Inputs for probes: deterministic, and of the layouts that checkpoints have."""

import mlx.core as mx

from mlx_dgemma.kernels.matrix import DENSE, Matrix


def dtype_named(name: int | str) -> mx.Dtype:
    """The dtype of a shape's "bfloat16"."""
    return {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}[str(name)]


def random_matrix(shape: tuple[int, ...], packing: str, dtype: mx.Dtype, key: mx.array) -> Matrix:
    """Random weights [..., out, in] of variance about 1 / in, every group with its own scale.

    Packed codes are drawn directly, so that nothing dense is held beside them.
    """
    *rows, columns = shape
    if packing == DENSE:
        return Matrix((mx.random.normal(shape, key=key) * columns**-0.5).astype(dtype))
    mode, numbers = packing.split()
    bits, group = map(int, numbers.split("/"))
    keys = mx.random.split(key, 3)
    codes = mx.random.randint(0, 256, (*rows, columns * bits // 8), dtype=mx.uint8, key=keys[0])
    packed, groups = codes.view(mx.uint32), (*rows, columns // group)
    if mode != "affine":
        exponents = mx.random.randint(119, 122, groups, dtype=mx.uint8, key=keys[1])
        return Matrix(packed, exponents, None, group, bits, mode, dtype)
    # uniform codes have a spread of 2 ** bits / 3.5 about their middle
    scales = mx.random.uniform(0.5, 1.5, groups, key=keys[1]) * (3.5 / 2**bits * columns**-0.5)
    middle = mx.random.uniform(0.45, 0.55, groups, key=keys[2]) * 2**bits
    biases = -scales * middle
    return Matrix(packed, scales.astype(dtype), biases.astype(dtype), group, bits)
