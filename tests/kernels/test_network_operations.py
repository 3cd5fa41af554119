"""Router, experts, q/k/v and attention: the twins against float64."""

import mlx.core as mx
import numpy as np
import pytest
import references as ref

from mlx_dgemma.kernels import Matrix, attend, choose_experts, moe, normed_heads
from mlx_dgemma.kernels.router import scaled_norm


def test_router_agrees_with_float64():
    mx.random.seed(0)
    x, scale = mx.random.normal((33, 24)), mx.random.normal((24,)) + 1
    weight, per_expert = mx.random.normal((9, 24)) * 4, mx.random.uniform(0.5, 1.5, (9,))
    found = choose_experts(scaled_norm(x, scale, 1e-6) @ weight.T, per_expert, 4)
    normed = ref.rms_norm(ref.numpy(x), None, 1e-6) * ref.numpy(scale) * 24**-0.5
    experts, weights, order, offsets = ref.route(
        normed @ ref.numpy(weight).T, ref.numpy(per_expert), 4
    )
    np.testing.assert_array_equal(np.array(found.experts), experts)
    np.testing.assert_allclose(np.array(found.weights), weights, rtol=2e-5)
    np.testing.assert_array_equal(np.array(found.order), order)
    np.testing.assert_array_equal(np.array(found.offsets), offsets)


def test_router_ties_take_the_lowest_index():
    scores = mx.array([[1.0, 2.0, 2.0, 1.0], [0.0, -0.0, 0.0, -1.0], [-3.0, -1.0, -1.0, -1.0]])
    found = choose_experts(scores, mx.ones((4,)), 2)
    assert found.experts.tolist() == [[1, 2], [0, 1], [1, 2]]
    assert found.offsets.tolist() == [0, 1, 4, 6, 6]
    assert found.order.tolist() == [2, 0, 3, 4, 1, 5]


def quantized(weight, mode):
    if mode is None:
        return Matrix(weight), ref.numpy(weight)
    bits = 8 if mode == "affine8" else 4
    name, group = ("affine", 32) if mode.startswith("affine") else (mode, 32)
    packed = mx.quantize(weight, group_size=group, bits=bits, mode=name)
    biases = packed[2] if len(packed) == 3 else None
    back = mx.dequantize(*packed[:2], biases, group_size=group, bits=bits, mode=name)
    return Matrix(packed[0], packed[1], biases, group, bits, name), ref.numpy(back)


@pytest.mark.parametrize("mode", [None, "affine4", "affine8", "mxfp4"])
def test_experts_agree_with_float64(mode):
    mx.random.seed(1)
    tokens, hidden, width, count, top_k = 21, 64, 32, 6, 3
    x = mx.random.normal((tokens, hidden))
    up, up_values = quantized(mx.random.normal((count, 2 * width, hidden)) * 0.1, mode)
    down, down_values = quantized(mx.random.normal((count, hidden, width)) * 0.1, mode)
    scores = mx.random.normal((tokens, count)).at[:, 2].add(-100.0)  # nobody asks expert 2
    routing = choose_experts(scores, mx.random.uniform(0.5, 1.5, (count,)), top_k)
    found = moe(x, routing, up, down)
    expected = ref.moe(
        ref.numpy(x),
        np.array(routing.experts),
        ref.numpy(routing.weights),
        up_values,
        down_values,
    )
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_rope", [False, True])
def test_norm_and_rope_agree_with_float64(with_weight, with_rope):
    mx.random.seed(2)
    batch, length, heads, dim = 2, 5, 4, 16
    x = mx.random.normal((batch, length, heads, dim))
    weight = mx.random.normal((dim,)) if with_weight else None
    frequencies = np.array([1.0, 0.1, 0, 0, 0, 0, 0, 0])  # proportional rope leaves most pairs
    positions = np.arange(length) + 100.0
    angles = positions[:, None] * frequencies
    rope = (mx.array(np.cos(angles)), mx.array(np.sin(angles))) if with_rope else None
    expected = ref.rms_norm(ref.numpy(x), ref.numpy(weight) if with_weight else None, 1e-6)
    expected = expected.swapaxes(1, 2)
    if with_rope:
        expected = ref.rope(expected, positions, frequencies)
    found = normed_heads(x, weight, rope, 1e-6)
    np.testing.assert_allclose(np.array(found), expected, atol=2e-5)


@pytest.mark.parametrize("chunk", [3, 4096])
def test_masked_attention_agrees_with_float64(chunk):
    """Whole chunks are hidden from some queries, the first among them."""
    mx.random.seed(4)
    q, k, v = (mx.random.normal((1, heads, n, 16)) for heads, n in ((4, 5), (2, 12), (2, 12)))
    i, j = np.arange(5)[:, None] + 7, np.arange(12)[None, :]
    mask = (j <= i) & (j > i - 4)
    found = attend(q, [(k, v)], chunk=chunk, mask=mx.array(mask))
    expected = ref.attention(ref.numpy(q), ref.numpy(k), ref.numpy(v), mask)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 5, 4096])
def test_a_mask_of_the_last_keys_leaves_the_others_visible(chunk):
    """It begins inside a chunk, at its edge, and within the only one."""
    mx.random.seed(5)
    q, k, v = (mx.random.normal((1, heads, n, 16)) for heads, n in ((4, 5), (2, 15), (2, 15)))
    mask = np.tri(5, dtype=bool)
    found = attend(q, [(k, v)], chunk=chunk, mask=mx.array(mask))
    whole = np.concatenate([np.ones((5, 10), dtype=bool), mask], axis=1)
    expected = ref.attention(ref.numpy(q), ref.numpy(k), ref.numpy(v), whole)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 4096])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_over_a_shared_prefix_agrees_with_float64(batch, chunk):
    mx.random.seed(3)
    q = mx.random.normal((batch, 4, 5, 16))
    prefix = tuple(mx.random.normal((1, 2, 7, 16)) for _ in range(2))
    own = tuple(mx.random.normal((batch, 2, 5, 16)) for _ in range(2))
    found = attend(q, [prefix, own], chunk=chunk)
    keys, values = (
        np.concatenate([np.repeat(ref.numpy(a), batch, 0), ref.numpy(b)], axis=2)
        for a, b in zip(prefix, own, strict=True)
    )
    np.testing.assert_allclose(
        np.array(found), ref.attention(ref.numpy(q), keys, values), atol=1e-5
    )
