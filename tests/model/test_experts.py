"""The router's tie rule against NumPy, and the sorted experts against one loop per position."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.kernels.matrix import Matrix
from mlx_dgemma.kernels.moe import combine_twin, down_twin
from mlx_dgemma.kernels.router import Routing, twin


def chosen_of(scores, count):
    """int32 [T, count]: the experts that scores [T, E] choose."""
    return twin(scores, mx.ones(scores.shape[1]), count).experts


def expected_indices(scores, count):
    """Best first; equal scores in the order of their index."""
    order = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:count] for row in scores]
    return np.array(order)


@pytest.mark.parametrize(
    ("row", "count", "chosen"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, 2.0, 2.0, 2.0], 2, [1, 2]),
        ([-1.0, -1.0, -2.0, -1.0], 3, [0, 1, 3]),
        ([0.0, -0.0, 0.0, -0.0], 3, [0, 1, 2]),  # the two zeros are equal
        ([3.0, -5.0, 3.0, 4.0], 3, [3, 0, 2]),
        ([1e-45, 0.0, -1e-45, 1e38], 4, [3, 0, 1, 2]),
    ],
)
def test_truth_table_of_exact_ties(row, count, chosen):
    assert chosen_of(mx.array([row]), count).tolist() == [chosen]


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(
            st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.5, 1.0, 3.25]), min_size=16, max_size=16
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 16),
)
def test_ties_go_to_the_lowest_index(rows, count):
    chosen = chosen_of(mx.array(rows, mx.float32), count)
    np.testing.assert_array_equal(np.array(chosen), expected_indices(rows, count))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_route_is_softmax_over_all_then_renormalised(dtype):
    rng = np.random.default_rng(0)
    scores = mx.array(rng.normal(size=(40, 128)).astype(np.float32)).astype(dtype)
    scale = rng.uniform(0.5, 1.5, 128).astype(np.float32)
    experts, weights, *_ = twin(scores, mx.array(scale), 8)

    plain = np.array(scores.astype(mx.float32), dtype=np.float64)
    probabilities = np.exp(plain) / np.exp(plain).sum(-1, keepdims=True)
    chosen = expected_indices(plain, 8)
    picked = np.take_along_axis(probabilities, chosen, -1)
    expected = picked / picked.sum(-1, keepdims=True) * scale[chosen]
    np.testing.assert_array_equal(np.array(experts), chosen)
    np.testing.assert_allclose(np.array(weights), expected, rtol=1e-5)


# Three positions that choose two of four experts each: [3, 0], [0, 3] and [1, 0].
SCORES = mx.array([[1.0, 0.0, 0.0, 2.0], [2.0, 0.0, 0.0, 1.0], [1.0, 2.0, 0.0, 0.0]])


def test_order_by_expert_then_position():
    routing = twin(SCORES, mx.ones(4), 2)
    assert routing.experts.tolist() == [[3, 0], [0, 3], [1, 0]]
    assert routing.order.tolist() == [1, 2, 5, 4, 0, 3]
    assert routing.experts.reshape(-1)[routing.order].tolist() == [0, 0, 0, 1, 3, 3]
    assert routing.offsets.tolist() == [0, 3, 4, 4, 6]


def test_combine_undoes_the_sort():
    routing: Routing = twin(SCORES, mx.ones(4), 2)
    rows = mx.arange(6, dtype=mx.float32)[:, None]  # choice n gives n
    weights = mx.array([[1.0, 0.5], [2.0, 1.0], [0.0, 10.0]])
    outputs = down_twin(rows[routing.order], routing, Matrix(mx.ones((4, 1, 1))))
    assert routing.places[routing.order].tolist() == list(range(6))
    total = combine_twin(outputs, routing.places, weights)
    assert total[:, 0].tolist() == [0.5, 7.0, 50.0]
