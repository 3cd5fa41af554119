"""The kernels of the sparse soft embeddings in the emulator, against float64."""

import math

import mlx.core as mx
import numpy as np
import pytest
import references as ref
from harness import DTYPES, TOLERANCE, emulated, every_setting, skip

from mlx_dgemma.kernels import Matrix
from mlx_dgemma.kernels.sparse_embeddings import (
    Survivors,
    gather_metal,
    survivors_metal,
    survivors_twin,
)

pytestmark = skip


def peaked(rows, columns, dtype):
    """Rows with a handful of tokens far above the threshold and a tail far below it."""
    mx.random.seed(columns)
    raw = mx.random.normal((rows, columns)) * 0.1 - 20.0
    for row in range(rows):
        raw[row, mx.arange(row % 5 + 1) * 97 % columns] = 10.0
    return raw.astype(dtype)


def check_survivors(raw, embedding, setting, capacity):
    values = ref.tempered(ref.numpy(raw), 0.8, 30.0)
    log_z = np.log(np.exp(values).sum(axis=1)).astype(np.float32)
    arguments = (raw, mx.array(log_z), 0.8, embedding)
    with emulated(setting):
        found = survivors_metal(*arguments, capacity=capacity)
    expected = survivors_twin(*arguments, capacity=capacity)
    assert mx.array_equal(found.ids, expected.ids)
    assert mx.array_equal(found.counts, expected.counts)
    tolerance = 1e-5 if embedding == mx.float32 else 2e-2
    for one, two in ((found.weights, expected.weights), (found.dropped, expected.dropped)):
        np.testing.assert_allclose(np.array(one), np.array(two), atol=tolerance)
    if embedding == mx.float32:
        p = ref.softmax(values)
        np.testing.assert_array_equal(np.array(found.counts), (p >= 1 / capacity).sum(axis=1))
        dropped = np.where(p >= 1 / capacity, 0, p).sum(axis=1)
        np.testing.assert_allclose(np.array(found.dropped), dropped, atol=2e-5)


@every_setting
@pytest.mark.parametrize("dtype", DTYPES)
def test_survivors(dtype, setting):
    for rows, columns in ((1, 1), (3, 100), (6, 2049), (2, 4500)):
        check_survivors(peaked(rows, columns, dtype), dtype, setting, 64)


def test_survivors_of_wide_logits_for_a_narrow_table():
    check_survivors(peaked(3, 2500, mx.float32), mx.bfloat16, "checked", 64)


def test_survivors_of_the_real_vocabulary():
    check_survivors(peaked(2, 262144, mx.bfloat16), mx.float32, "in order", 1024)


def test_nothing_or_everything_survives():
    raw = mx.zeros((1, 40))
    for capacity, count in ((8, 0), (64, 40)):
        with emulated():
            found = survivors_metal(
                raw, mx.log(mx.array([40.0])), 1.0, mx.float32, capacity=capacity
            )
        assert found.counts.tolist() == [count]
        np.testing.assert_allclose(np.array(found.dropped), [1.0 - count / 40], atol=1e-6)


def check_gather(dtype, bits, hidden, setting, *, group=64):
    tokens, capacity, rows = 50, 16, 4
    weight = mx.random.normal((tokens, hidden), key=mx.random.key(hidden)).astype(dtype)
    matrix, values = Matrix(weight), ref.numpy(weight)
    if bits:
        packed = mx.quantize(weight, group_size=group, bits=bits)
        matrix = Matrix(*packed, group, bits)
        wide = [part.astype(mx.float32) for part in packed[1:]]
        values = ref.numpy(mx.dequantize(packed[0], *wide, group_size=group, bits=bits))
    counts = np.array([1, 16, 0, 9])
    filled = mx.arange(capacity)[None, :] < mx.array(counts)[:, None]
    ids = mx.random.randint(0, tokens, (rows, capacity), key=mx.random.key(1)).astype(mx.int32)
    weights = mx.where(filled, mx.random.uniform(0.1, 1.0, ids.shape, key=mx.random.key(2)), 0.0)
    with emulated(setting):
        found = gather_metal(
            Survivors(ids, weights, mx.array(counts), mx.zeros((rows,))), matrix, counts
        )
    w = ref.numpy(weights.astype(dtype))
    w /= np.maximum(w.sum(1, keepdims=True), 1e-30)
    expected = np.einsum("rs,rsh->rh", w, values[np.array(ids)])
    assert not np.array(found.astype(mx.float32))[2].any()
    expected *= ref.numpy(mx.array(math.sqrt(hidden)).astype(dtype))
    error = np.abs(ref.numpy(found) - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[dtype], error


@every_setting
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_from_four_bits(dtype, setting):
    check_gather(dtype, 4, 128, setting)


@pytest.mark.parametrize(("bits", "hidden"), [(0, 30), (0, 128), (8, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_from_other_tables(dtype, bits, hidden):
    check_gather(dtype, bits, hidden, "checked")


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_gather_of_the_real_width(bits):
    check_gather(mx.bfloat16, bits, 2816, "checked")
