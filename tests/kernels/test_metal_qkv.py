"""The norm-and-rope kernel in the emulator, against float64."""

import mlx.core as mx
import numpy as np
import pytest
import references as ref
from harness import DTYPES, TOLERANCE, emulated, every_setting, skip
from msl import toolchain
from msl.emulator import MetalKernel

from mlx_dgemma.kernels import qkv

pytestmark = skip


def check(dtype, head_dim, setting, *, weight, rope, batch=2, length=3, heads=5):
    mx.random.seed(head_dim)
    x = mx.random.normal((batch, length, heads, head_dim)).astype(dtype)
    weights = mx.random.normal((head_dim,)).astype(dtype) if weight else None
    angles = mx.random.uniform(0.0, 6.0, (length, head_dim // 2))
    tables = (mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype)) if rope else None
    with emulated(setting):
        found = qkv.metal(x, weights, tables, 1e-6)
    expected = ref.rms_norm(ref.numpy(x), ref.numpy(weights) if weight else None, 1e-6)
    expected = expected.swapaxes(1, 2)
    if rope:
        cosine, sine = (ref.numpy(part) for part in tables)
        a, b = expected[..., : head_dim // 2], expected[..., head_dim // 2 :]
        expected = np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
    error = np.abs(ref.numpy(found) - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[dtype], error


@every_setting
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys(dtype, setting):
    check(dtype, 64, setting, weight=True, rope=True)


@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize(("weight", "rope"), [(True, True), (False, False)])
def test_the_real_head_dims(head_dim, weight, rope):
    check(mx.bfloat16, head_dim, "checked", weight=weight, rope=rope, batch=1, heads=2)


@pytest.mark.skipif(toolchain.reason_to_skip() is not None, reason="strides of NumPy views")
def test_parts_of_a_joint_projection_are_read_where_they_lie():
    header, body = qkv._KERNEL.text
    kernel = MetalKernel(
        "n", list(qkv._KERNEL.inputs), ["y"], body, header, ensure_row_contiguous=False
    )
    joint = np.random.default_rng(0).standard_normal((2, 3, 6, 64)).astype(np.float32)
    part, empty = joint[:, :, 2:4], np.zeros(8, np.float32)
    (found,) = kernel(
        inputs=[part, empty, empty, empty, np.array([1e-6], np.float32)],
        template=[("T", mx.float32), ("D", 64), ("HAS_WEIGHT", False), ("HAS_ROPE", False)],
        grid=(32, 2, 6),
        threadgroup=(32, 2, 1),
        output_shapes=[(2, 2, 3, 64)],
        output_dtypes=[mx.float32],
    )
    expected = ref.rms_norm(part.astype(np.float64), None, 1e-6).swapaxes(1, 2)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)
