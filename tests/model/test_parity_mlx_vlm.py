"""Both passes against mlx-vlm in float32, on a random checkpoint in the published dialect."""

import mlx.core as mx
import numpy as np
import pytest
from transformers_oracle import assert_close

CANVAS = 12


@pytest.fixture(scope="module")
def reference(checkpoint):
    from mlx_vlm_oracle import VlmReference

    return VlmReference(checkpoint)


def draw(seed, count):
    return np.random.default_rng(seed).integers(0, 92, (1, count))


@pytest.mark.parametrize("length", [5, 16, 60])
def test_blocks_with_self_conditioning(model, reference, length):
    reference.reset()
    cache = model.make_cache()
    ids = draw(length, length)
    reference.prefill(ids)
    model.prefill(ids, cache)
    for block in range(3):
        canvas = draw(20 + block, CANVAS)
        first = reference.denoise(canvas)
        assert_close(model.denoise(mx.array(canvas), cache), first)
        second = reference.denoise(canvas, first / 0.7)
        assert_close(model.denoise(mx.array(canvas), cache, mx.array(first / 0.7)), second)
        committed = second.argmax(-1)
        reference.prefill(committed)
        model.prefill(committed, cache)
