"""Soft embeddings: the dense path against float64, the sparse path within its bound."""

import math

import mlx.core as mx
import numpy as np
import pytest
import references as ref

from mlx_dgemma.benchmark.graph import launches
from mlx_dgemma.kernels import (
    DROPPED_MASS,
    Matrix,
    gather_soft_embeddings,
    row_statistics,
    select_survivors,
    sliced_soft_embeddings,
    soft_embeddings,
)
from mlx_dgemma.kernels.row_statistics import SLICE
from mlx_dgemma.kernels.soft_embeddings import probabilities
from mlx_dgemma.kernels.sparse_embeddings import most_entropy

WIDTH = 128


def statistics(raw, temperature):
    return row_statistics(raw, temperature, mx.zeros((raw.shape[0], 2)))


def table(rows, mode=None, dtype=mx.float32):
    mx.random.seed(rows)
    dense = (mx.random.normal((rows, WIDTH)) * 0.05).astype(dtype)
    if mode is None:
        return Matrix(dense), ref.numpy(dense)
    bits = 8 if mode == "affine8" else 4
    name, group = ("affine", 64) if mode.startswith("affine") else (mode, 32)
    packed = mx.quantize(dense, group_size=group, bits=bits, mode=name)
    biases = packed[2] if len(packed) == 3 else None
    matrix = Matrix(packed[0], packed[1], biases, group, bits, name, mx.float32)
    back = mx.dequantize(*packed[:2], biases, group_size=group, bits=bits, mode=name)
    return matrix, ref.numpy(back)


@pytest.mark.parametrize("mode", [None, "affine4", "affine8", "mxfp4"])
@pytest.mark.parametrize("columns", [96, SLICE + 40])
def test_dense_agrees_with_float64(columns, mode):
    matrix, values = table(columns, mode)
    raw = mx.random.normal((4, columns)) * 6
    stats = statistics(raw, 0.8)
    found = soft_embeddings(raw, stats.log_z, 0.8, matrix)
    p = ref.softmax(ref.tempered(ref.numpy(raw), 0.8, 30.0))
    expected = p @ values * math.sqrt(WIDTH)
    np.testing.assert_allclose(ref.numpy(found), expected, atol=2e-5)


def test_half_precision_follows_the_contract():
    matrix, values = table(700, dtype=mx.bfloat16)
    raw = (mx.random.normal((6, 700)) * 6).astype(mx.bfloat16)
    stats = statistics(raw, 0.6)
    found = soft_embeddings(raw, stats.log_z, 0.6, matrix)
    assert found.dtype == mx.bfloat16
    cast = mx.array(ref.tempered(ref.numpy(raw), 0.6, 30.0).astype(np.float32)).astype(mx.bfloat16)
    p = mx.softmax(cast.astype(mx.float32), axis=-1).astype(mx.bfloat16)
    factor = ref.numpy(mx.array(math.sqrt(WIDTH)).astype(mx.bfloat16))
    expected = ref.numpy(p) @ values * factor
    scale = np.abs(expected).max()
    np.testing.assert_allclose(ref.numpy(found) / scale, expected / scale, atol=2e-2)


def test_slices_made_one_at_a_time_agree():
    matrix, _ = table(2 * SLICE + 7)
    hidden = mx.random.normal((3, WIDTH)) * 2
    raw = matrix.apply(hidden, transpose=True)
    stats = statistics(raw, 0.5)
    whole = soft_embeddings(raw, stats.log_z, 0.5, matrix)
    sliced = sliced_soft_embeddings(
        lambda start, stop: matrix.rows(start, stop).apply(hidden, transpose=True),
        stats.log_z,
        0.5,
        matrix,
    )
    np.testing.assert_allclose(np.array(whole), np.array(sliced), atol=1e-5)


@pytest.mark.parametrize("mode", [None, "affine4"])
def test_sparse_stays_within_its_bound(mode):
    columns, capacity = SLICE + 300, 64
    matrix, values = table(columns, mode)
    raw = mx.random.normal((5, columns))
    for row in range(5):  # one certain row, then ever more rivals
        raw[row, mx.arange(row * 10 + 1) * 397] += 24.0
    stats = statistics(raw, 0.8)
    survivors = select_survivors(raw, stats.log_z, 0.8, mx.float32, capacity=capacity)
    p = ref.softmax(ref.tempered(ref.numpy(raw), 0.8, 30.0))
    survives = p >= 1 / capacity
    np.testing.assert_array_equal(np.array(survivors.counts), survives.sum(1))
    for row in range(5):
        ids = np.flatnonzero(survives[row])
        np.testing.assert_array_equal(np.array(survivors.ids[row])[: ids.size], ids)
        assert not np.array(survivors.weights[row])[ids.size :].any()
    dropped = np.where(survives, 0, p).sum(1)
    np.testing.assert_allclose(np.array(survivors.dropped), dropped, atol=1e-5)
    counts = np.array(survivors.counts)
    found = np.array(gather_soft_embeddings(survivors, matrix, counts))
    part = np.array(gather_soft_embeddings(survivors, matrix, counts * [1, 0, 1, 0, 1]))
    np.testing.assert_array_equal(part[::2], found[::2])
    assert not part[1::2].any()
    dense = np.array(soft_embeddings(raw, stats.log_z, 0.8, matrix))
    largest = np.linalg.norm(values, axis=1).max() * math.sqrt(WIDTH)
    error = np.linalg.norm(found - dense, axis=1)
    assert (error <= 2 * np.array(survivors.dropped) * largest + 1e-5).all()
    assert np.array(survivors.dropped)[0] < DROPPED_MASS < 1


def test_the_highest_entropy_of_a_row_that_qualifies():
    capacity, vocabulary = 64, 4000
    highest = most_entropy(vocabulary, capacity)
    rest = DROPPED_MASS * 0.999
    p = np.full(vocabulary, rest / (vocabulary - capacity))
    p[:capacity] = (1 - rest) / capacity
    assert 0 <= highest - -(p * np.log(p)).sum() < 0.01
    rng = np.random.default_rng(0)
    for spread in np.linspace(0.1, 8.0, 200):
        p = np.exp(rng.normal(size=vocabulary) * spread)
        p /= p.sum()
        if p[p < 1 / capacity].sum() < DROPPED_MASS:
            assert -(p * np.log(np.maximum(p, 1e-300))).sum() <= highest


def test_no_row_survives_more_often_than_the_capacity():
    raw = mx.zeros((2, 40))
    stats = statistics(raw, 0.8)
    survivors = select_survivors(raw, stats.log_z, 0.8, mx.float32, capacity=8)
    assert survivors.counts.tolist() == [0, 0]
    np.testing.assert_allclose(np.array(survivors.dropped), 1.0)
    full = select_survivors(raw, stats.log_z, 0.8, mx.float32, capacity=64)
    assert full.counts.tolist() == [40, 40]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_probability_is_one_launch_of_nearly_the_same_bits(dtype, monkeypatch):
    raw = (mx.random.normal((3, 50), key=mx.random.key(1)) * 9).astype(dtype)
    divisor, log_z = mx.full((1, 1), 0.7), mx.array([20.0, 25.0, 30.0])
    mx.eval(raw, divisor)  # what is given is not counted
    one = probabilities(raw, divisor, log_z, 30.0, dtype, dtype)
    counted = launches([one])
    x = raw.astype(mx.float32)
    values = (30.0 * mx.tanh(x / 30.0) / divisor).astype(dtype).astype(mx.float32)
    steps = mx.exp(values - log_z[:, None]).astype(dtype)
    # On the CPU MLX compiles what rounds to 16 bits in two parts with a cast between them.
    parts = 1 if dtype == mx.float32 else 2
    assert counted["Compiled"] == parts
    assert counted.total() == 2 * parts - 1 < launches([steps]).total()
    if dtype == mx.float32:  # the CPU's compiled exponential may differ in its last digit
        np.testing.assert_allclose(np.array(one), np.array(steps), rtol=1e-6)
    else:
        apart = np.array((one.astype(mx.float32) - steps.astype(mx.float32)).abs())
        assert (apart > 0).mean() < 0.02
