"""Accept and renoise: truth tables, ties, pins, and the three numbers for the host."""

import mlx.core as mx
import numpy as np
import pytest
import references as ref

from mlx_dgemma.kernels import accept_renoise


def run(entropy, *, bound=0.1, previous=None, pinned=None):
    entropy = mx.array(entropy, dtype=mx.float32)
    shape = entropy.shape
    return accept_renoise(
        mx.full(shape, 7, dtype=mx.int32),
        entropy,
        mx.full(shape, 3, dtype=mx.int32),
        mx.full(shape, 1, dtype=mx.int32),
        mx.full(shape, 2, dtype=mx.int32),
        None if previous is None else mx.array(previous, dtype=mx.int32),
        bound,
        pinned=None if pinned is None else mx.array(pinned),
    )


@pytest.mark.parametrize(
    ("entropy", "bound", "kept"),
    [
        ([5.0, 4.0, 6.0], 0.1, [0, 1, 0]),  # the lowest is always kept
        ([0.25, 0.25, 0.25, 0.25], 0.5, [1, 1, 1, 0]),  # sums below: 0, .25, .5, .75
        ([0.0, 0.0, 0.0], 0.0, [1, 1, 1]),
        ([0.3, 0.1, 0.0], 0.1, [1, 1, 1]),  # 0.3 has only 0.1 below it
        ([0.25, 0.25, 0.25, 0.25], 0.3, [1, 1, 0, 0]),  # ties: the lowest index first
    ],
)
def test_truth_table(entropy, bound, kept):
    found = run([entropy], bound=bound)
    assert found.accepted.tolist() == [[bool(k) for k in kept]]
    assert found.canvas.tolist() == [[1 if k else 2 for k in kept]]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 256])
def test_agrees_with_the_definition(length):
    rng = np.random.default_rng(length)
    entropy = rng.choice([0.0, 0.003, 0.01, 0.5, 4.0], (3, length)) + (
        rng.random((3, length)) < 0.3
    )
    pinned = rng.random((3, length)) < 0.2
    found = run(entropy, bound=0.1, pinned=pinned)
    expected = ref.accept(entropy.astype(np.float32), 0.1, pinned)
    np.testing.assert_array_equal(np.array(found.accepted), expected)
    np.testing.assert_array_equal(
        np.array(found.canvas), np.where(pinned, 7, np.where(expected, 1, 2))
    )


def test_pins_leave_choice_comparison_and_mean_alone():
    found = run([[0.0, 2.0, 4.0]], bound=1.0, previous=[[9, 3, 3]], pinned=[[True, False, False]])
    assert found.accepted.tolist() == [[False, True, False]]
    assert found.canvas.tolist() == [[7, 1, 2]]
    assert found.status.tolist() == [[1.0, 3.0, 1.0]]


def test_a_canvas_of_pins_alone():
    found = run([[1.0, 2.0]], previous=[[0, 0]], pinned=[[True, True]])
    assert found.canvas.tolist() == [[7, 7]]
    assert found.status.tolist() == [[1.0, 0.0, 1.0]]


def test_positions_out_of_the_choice_add_nothing(monkeypatch):
    """A large number in their place would drown the others where sums are taken in parallel."""
    summed = []
    monkeypatch.setattr(
        mx, "cumsum", lambda x, real=mx.cumsum, **options: summed.append(x) or real(x, **options)
    )
    found = run([[0.0, 0.3, float("nan"), 0.05]], pinned=[[True, False, False, False]])
    assert found.accepted.tolist() == [[False, True, False, True]]
    np.testing.assert_allclose(np.array(summed[0]), [[0.05, 0.3, 0.0, 0.0]])


def test_status_per_row():
    found = run([[0.1, 0.3], [0.2, 0.2]], previous=[[3, 3], [3, 4]])
    np.testing.assert_allclose(np.array(found.status), [[1, 0.2, 1], [0, 0.2, 1]], rtol=1e-6)
    assert run([[0.1]]).status.tolist()[0][0] == 0.0  # a first step has no previous draft


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_is_flagged_and_never_accepted(poison):
    found = run([[poison, 0.5], [0.1, 0.2]])
    assert found.status[:, 2].tolist() == [0.0, 1.0]
    assert found.accepted[0].tolist() == [False, True]
