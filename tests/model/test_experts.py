"""The router's tie rule against NumPy, and the sorted experts against one loop per position."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.model.experts import by_expert, combine, route, top_indices


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
    assert top_indices(mx.array([row]), count).tolist() == [chosen]


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
    chosen = top_indices(mx.array(rows, mx.float32), count)
    np.testing.assert_array_equal(np.array(chosen), expected_indices(rows, count))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_route_is_softmax_over_all_then_renormalised(dtype):
    rng = np.random.default_rng(0)
    scores = mx.array(rng.normal(size=(40, 128)).astype(np.float32)).astype(dtype)
    scale = rng.uniform(0.5, 1.5, 128).astype(np.float32)
    experts, weights = route(scores, mx.array(scale), 8)

    plain = np.array(scores.astype(mx.float32), dtype=np.float64)
    probabilities = np.exp(plain) / np.exp(plain).sum(-1, keepdims=True)
    chosen = expected_indices(plain, 8)
    picked = np.take_along_axis(probabilities, chosen, -1)
    expected = picked / picked.sum(-1, keepdims=True) * scale[chosen]
    np.testing.assert_array_equal(np.array(experts), chosen)
    np.testing.assert_allclose(np.array(weights), expected, rtol=1e-5)


def test_order_by_expert_then_position():
    experts = mx.array([[3, 0], [0, 3], [1, 0]])
    order, ascending = by_expert(experts)
    assert order.tolist() == [1, 2, 5, 4, 0, 3]
    assert ascending.tolist() == [0, 0, 0, 1, 3, 3]


def test_combine_undoes_the_sort():
    experts = mx.array([[3, 0], [0, 3], [1, 0]])
    order, _ = by_expert(experts)
    rows = mx.arange(6, dtype=mx.float32)[:, None]  # choice n gives n
    weights = mx.array([[1.0, 0.5], [2.0, 1.0], [0.0, 10.0]])
    total = combine(rows[order], order, weights)
    assert total[:, 0].tolist() == [0.5, 7.0, 50.0]
