"""The quick tanh of the CPU backend against the obvious one."""

import mlx.core as mx
import numpy as np

from mlx_dgemma.kernels.tanh import tanh


def test_values_and_gradients_are_those_of_tanh():
    x = mx.array(np.concatenate([np.linspace(-12, 12, 20001), [0.0, 1e-20, -3e38, 3e38]]))
    x = x.astype(mx.float32)
    found, exact = np.array(tanh(x)), np.tanh(np.array(x, np.float64))
    assert np.abs(found - exact).max() < 4e-7
    assert np.abs(found).max() <= 1
    inside = np.abs(np.array(x)) < 100
    slope = np.array(mx.grad(lambda v: tanh(v).sum())(x))
    assert np.abs(slope - (1 - exact**2))[inside].max() < 1e-6


def test_what_is_not_finite():
    x = mx.array([float("nan"), float("inf"), -float("inf")])
    assert np.allclose(np.array(tanh(x)), [np.nan, 1, -1], equal_nan=True)
