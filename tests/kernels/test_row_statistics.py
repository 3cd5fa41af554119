"""The row statistics' twin against float64, against itself slice by slice, and on poisoned rows."""

import sys

import mlx.core as mx
import numpy as np
import pytest
import references as ref

from mlx_dgemma.kernels import row_statistics, sliced_row_statistics
from mlx_dgemma.kernels.row_statistics import OPERATION, SLICE


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("columns", [1, 5, 511, 512, 513, SLICE, SLICE + 700, 2 * SLICE])
def test_agrees_with_float64(columns, dtype):
    mx.random.seed(columns)
    raw = (mx.random.normal((5, columns)) * 12).astype(dtype)
    uniforms = mx.random.uniform(shape=(5, 2))
    found = row_statistics(raw, 0.7, uniforms)
    values = ref.tempered(ref.numpy(raw), 0.7, 30.0)
    p = ref.softmax(values)
    np.testing.assert_allclose(np.array(found.entropy), ref.entropy(p), atol=5e-6)
    np.testing.assert_array_equal(np.array(found.argmax), values.argmax(axis=1))
    np.testing.assert_allclose(np.array(found.max), values.max(axis=1), rtol=1e-6)
    log_z = np.log(np.exp(values - values.max(1, keepdims=True)).sum(1)) + values.max(1)
    np.testing.assert_allclose(np.array(found.log_z), log_z, rtol=1e-6, atol=1e-6)
    ids, margins = ref.sample(p, np.array(uniforms).astype(np.float64))
    clear = margins > 1e-5
    np.testing.assert_array_equal(np.array(found.sample)[clear], ids[clear])


def test_a_self_check_times_nothing_beside_what_it_compares(monkeypatch):
    probe = next(OPERATION.probes({"dtype": "float32", "vocabulary": 100, "rows": 2}))
    module = sys.modules["mlx_dgemma.kernels.row_statistics"]
    monkeypatch.setattr(module, "twin", lambda *_, **__: pytest.fail("a twin runs as well"))
    assert len(probe.twin()) == 5


def test_a_temperature_per_row():
    raw = mx.random.normal((3, 100))
    together = row_statistics(raw, mx.array([0.8, 0.6, 0.4]), mx.full((3, 2), 0.3))
    for row, temperature in enumerate((0.8, 0.6, 0.4)):
        alone = row_statistics(raw[row : row + 1], temperature, mx.full((1, 2), 0.3))
        for one, many in zip(alone, together, strict=True):
            assert one[0].item() == many[row].item()
    with pytest.raises(ValueError, match="2 values for 3 rows"):
        row_statistics(raw, mx.array([1.0, 1.0]), mx.full((3, 2), 0.3))


def test_slices_made_one_at_a_time_give_the_same_ids():
    mx.random.seed(3)
    hidden, table = mx.random.normal((4, 16)), mx.random.normal((2 * SLICE + 100, 16))
    uniforms = mx.random.uniform(shape=(4, 2))
    whole = row_statistics(hidden @ table.T, 0.5, uniforms)
    seen = []

    def head(start, stop):
        seen.append((start, stop))
        return hidden @ table[start:stop].T

    sliced = sliced_row_statistics(head, 4, table.shape[0], 0.5, uniforms)
    assert seen == [(0, SLICE), (SLICE, 2 * SLICE), (2 * SLICE, 2 * SLICE + 100)]
    assert mx.array_equal(whole.argmax, sliced.argmax)
    assert mx.array_equal(whole.sample, sliced.sample)
    np.testing.assert_allclose(np.array(whole.entropy), np.array(sliced.entropy), atol=1e-5)


@pytest.mark.parametrize("temp", [1.0, 0.5, 2.0])
def test_samples_have_the_distribution(temp):
    mx.random.seed(11)
    row = mx.random.normal((1, SLICE + 40)) + mx.where(mx.arange(SLICE + 40) % 4099 == 7, 9.0, 0.0)
    rows = 1500
    stats = row_statistics(
        mx.broadcast_to(row, (rows, SLICE + 40)), 0.8, mx.random.uniform(shape=(rows, 2)), temp=temp
    )
    p = ref.softmax(ref.tempered(ref.numpy(row), 0.8, 30.0) / temp)[0]
    counts = np.bincount(np.array(stats.sample), minlength=p.size)
    big = p > 2e-3
    groups = np.append(counts[big], counts[~big].sum())
    expected = np.append(p[big], p[~big].sum()) * rows
    keep = expected > 5
    chi_square = ((groups - expected)[keep] ** 2 / expected[keep]).sum()
    assert chi_square < keep.sum() + 5 * np.sqrt(2 * keep.sum())


def test_temp_zero_takes_the_argmax_and_ties_take_the_lowest_index():
    raw = mx.zeros((2, SLICE + 9))
    raw[0, SLICE + 3] = 5.0
    raw[0, 70] = 5.0
    stats = row_statistics(raw, 0.8, mx.full((2, 2), 0.99), temp=0.0)
    assert stats.argmax.tolist() == [70, 0]
    assert stats.sample.tolist() == [70, 0]


def test_the_edges_of_the_uniforms_never_reach_an_impossible_token():
    raw = mx.full(
        (2, 2000), -1e4
    )  # softcap and temperature leave e^(-150) at most: zero in float32
    raw[:, 900:910] = 1e4
    almost_one = float(np.nextafter(np.float32(1), np.float32(0)))
    stats = row_statistics(raw, 0.4, mx.array([[0.0, 0.0], [almost_one, almost_one]]))
    assert stats.sample.tolist() == [900, 909]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_poison_surfaces_in_its_row_only(poison):
    raw = mx.random.normal((3, SLICE + 5))
    raw[1, SLICE + 1] = poison
    stats = row_statistics(raw, 0.8, mx.full((3, 2), 0.5))
    assert np.isnan(np.array(stats.entropy)).tolist() == [False, True, False]
