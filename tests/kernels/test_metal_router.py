"""The router's Metal kernels in the emulator, against the definition."""

import mlx.core as mx
import numpy as np
import pytest
import references as ref
from harness import DTYPES, emulated, every_setting, skip

from mlx_dgemma.kernels.router import metal

pytestmark = skip


def check(scores, top_k, setting):
    per_expert = mx.random.uniform(0.5, 1.5, (scores.shape[1],), key=mx.random.key(0))
    with emulated(setting):
        found = metal(scores, per_expert, top_k)
    experts, weights, order, offsets = ref.route(ref.numpy(scores), ref.numpy(per_expert), top_k)
    np.testing.assert_array_equal(np.array(found.experts), experts)
    np.testing.assert_allclose(np.array(found.weights), weights, rtol=2e-5)
    np.testing.assert_array_equal(np.array(found.order), order)
    np.testing.assert_array_equal(np.array(found.offsets), offsets)


@every_setting
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_definition(dtype, setting):
    for tokens, count, top_k in ((1, 4, 1), (9, 33, 3), (31, 128, 8)):
        mx.random.seed(tokens)
        ties = mx.round(mx.random.normal((tokens, count)) * 3) / 3
        check(ties.astype(dtype), top_k, setting)


def test_the_real_shape():
    mx.random.seed(5)
    check(mx.random.normal((256, 128)), 8, "checked")


def test_everybody_wants_one_expert():
    scores = mx.zeros((40, 5))
    scores[:, 4] = 3.0
    check(scores, 1, "checked")
    check(scores, 5, "checked")


def test_poison_leaves_the_sort_in_bounds():
    scores = mx.zeros((3, 8))
    scores[1] = float("nan")
    scores[2, 3] = float("-inf")
    with emulated():
        found = metal(scores, mx.ones((8,)), 2)
    assert sorted(found.order.tolist()) == list(range(6))
    assert found.experts[1].tolist() == [0, 1]
