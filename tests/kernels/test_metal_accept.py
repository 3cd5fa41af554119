"""The accept kernel in the emulator, against its definition and its twin."""

import mlx.core as mx
import numpy as np
import pytest
import references as ref
from harness import emulated, every_setting, skip

from mlx_dgemma.kernels.accept import metal, twin

pytestmark = skip


def inputs(batch, length, *, pins):
    rng = np.random.default_rng(length)
    entropy = rng.choice([0.0, 0.003, 0.01, 0.5, 4.0], (batch, length))
    entropy += rng.integers(0, 4, (batch, length)) / 16
    ids = [mx.array(rng.integers(0, 9, (batch, length)).astype(np.int32)) for _ in range(4)]
    previous = mx.array(ids[1])
    if length % 2 == 0:
        previous[0, length // 2 + 1] = 99  # one position of one canvas, in the middle of a group
    pinned = mx.array(rng.random((batch, length)) < 0.3) if pins else None
    return (ids[0], mx.array(entropy.astype(np.float32)), *ids[1:], previous, 0.3), pinned


@every_setting
@pytest.mark.parametrize("length", [1, 7, 32, 33, 255, 256])
def test_agrees_with_the_definition(length, setting):
    for batch, pins in ((1, False), (3, True)):
        arguments, pinned = inputs(batch, length, pins=pins)
        with emulated(setting):
            found = metal(*arguments, pinned=pinned)
        mask = np.zeros((batch, length), bool) if pinned is None else np.array(pinned)
        expected = ref.accept(np.array(arguments[1]), 0.3, mask)
        np.testing.assert_array_equal(np.array(found.accepted), expected)
        other = twin(*arguments, pinned=pinned)
        assert mx.array_equal(found.canvas, other.canvas)
        np.testing.assert_allclose(np.array(found.status), np.array(other.status), rtol=1e-5)


def test_a_first_step_poison_and_pins_everywhere():
    arguments, _ = inputs(2, 40, pins=False)
    entropy = mx.array(arguments[1])
    entropy[0, 3] = float("nan")
    entropy[1, 39] = float("inf")
    first = (arguments[0], entropy, *arguments[2:5], None, 0.3)
    everywhere = mx.ones((2, 40), dtype=mx.bool_)
    for pinned in (None, everywhere):
        with emulated():
            found = metal(*first, pinned=pinned)
        other = twin(*first, pinned=pinned)
        assert mx.array_equal(found.canvas, other.canvas)
        assert mx.array_equal(found.accepted, other.accepted)
        assert mx.array_equal(found.status, other.status, equal_nan=True)
        assert found.status[:, 0].tolist() == [0.0, 0.0]
