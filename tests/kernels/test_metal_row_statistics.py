"""The row statistics' Metal kernel in the emulator, against float64."""

import mlx.core as mx
import numpy as np
import pytest
import references as ref
from harness import DTYPES, emulated, every_setting, skip

from mlx_dgemma.kernels.row_statistics import SLICE, metal, twin

pytestmark = skip


def check(raw, uniforms, setting, *, temperature=0.7, temp=1.0):
    with emulated(setting):
        found = metal(raw, temperature, uniforms, temp=temp)
    values = ref.tempered(ref.numpy(raw), temperature, 30.0)
    p = ref.softmax(values)
    largest = values.max(axis=1)
    np.testing.assert_allclose(np.array(found.entropy), ref.entropy(p), atol=2e-4)
    np.testing.assert_allclose(np.array(found.max), largest, rtol=1e-5, atol=1e-5)
    log_z = np.log(np.exp(values - largest[:, None]).sum(1)) + largest
    np.testing.assert_allclose(np.array(found.log_z), log_z, rtol=1e-5, atol=2e-5)
    if setting != "inexact":
        np.testing.assert_array_equal(np.array(found.argmax), values.argmax(axis=1))
    if temp == 0:
        assert mx.array_equal(found.sample, found.argmax)
        return
    ids, margins = ref.sample(ref.softmax(values / temp), np.array(uniforms).astype(np.float64))
    clear = margins > 1e-4
    np.testing.assert_array_equal(np.array(found.sample)[clear], ids[clear])


def inputs(rows, columns, dtype):
    mx.random.seed(rows * columns)
    raw = (mx.random.normal((rows, columns)) * 12).astype(dtype)
    return raw, mx.random.uniform(shape=(rows, 2))


@every_setting
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype, setting):
    for rows, columns in ((1, 1), (1, 3), (3, 31), (2, 257), (2, 1024), (5, 1499)):
        check(*inputs(rows, columns, dtype), setting)


@pytest.mark.parametrize("setting", ["checked", "greedy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_slices(dtype, setting):
    check(*inputs(2, 2 * SLICE + 77, dtype), setting)


@pytest.mark.parametrize("temp", [0.0, 0.5, 2.0])
def test_sampling_temperatures(temp):
    check(*inputs(4, 700, mx.float32), "checked", temp=temp)


def test_a_temperature_per_row():
    check(*inputs(9, 100, mx.float32), "checked", temperature=np.linspace(0.4, 0.8, 9))


def test_the_real_vocabulary():
    check(*inputs(1, 262144, mx.bfloat16), "in order")


def test_ties_edges_and_poison_as_in_the_twin():
    raw = mx.full((4, SLICE + 900), -1e4)
    raw[0, SLICE + 3] = raw[0, 70] = 5.0
    raw[1, 900:910] = 1e4
    raw[2, SLICE + 1] = float("inf")
    raw[3, 4] = float("nan")
    almost_one = float(np.nextafter(np.float32(1), np.float32(0)))
    for uniform in (0.0, almost_one):
        uniforms = mx.full((4, 2), uniform)
        with emulated():
            found = metal(raw, 0.4, uniforms)
        expected = twin(raw, 0.4, uniforms)
        assert found.argmax[:2].tolist() == expected.argmax[:2].tolist()
        assert found.sample[1].item() == expected.sample[1].item() == (909 if uniform else 900)
        assert np.isnan(np.array(found.entropy)).tolist() == [False, False, True, True]
