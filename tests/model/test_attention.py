"""Masks as truth tables, and every way of cutting attention into pieces against one NumPy line."""

import mlx.core as mx
import numpy as np
import pytest
from plain_checkpoint import write_plain

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.model import attention
from mlx_dgemma.model.attention import attend, attend_causal
from mlx_dgemma.model.masks import encoder_mask, image_blocks


def visible(*arguments):
    mask = encoder_mask(*arguments)
    return None if mask is None else np.array(mask).astype(int).tolist()


def test_causal_mask():
    assert visible(0, 3, 0, 3, None) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert visible(5, 1, 0, 6, None) is None  # one query sees everything: no mask
    assert visible(2, 2, 0, 4, None) == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_window_counts_the_query_itself():
    """Key j is visible to query i iff i - 3 < j <= i."""
    assert visible(0, 5, 0, 5, 3) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert visible(9, 1, 7, 3, 3) is None
    assert visible(9, 1, 6, 4, 3) == [[0, 1, 1, 1]]


def test_image_blocks_see_each_other_past_the_window():
    blocks = np.array([-1, 0, 0, 0, -1])
    assert visible(2, 5, 0, 7, 2, blocks) == [
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_every_run_of_image_tokens_is_a_block():
    is_image = np.array([0, 1, 1, 0, 1, 0, 0, 1], dtype=bool)
    assert image_blocks(is_image).tolist() == [-1, 0, 0, -1, 1, -1, -1, 2]


def plain(queries, keys, values, mask=None):
    """softmax(q k^T) v in float64, with repeated keys."""
    q, k, v = (np.array(x.astype(mx.float32), np.float64) for x in (queries, keys, values))
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat(repeat, 1), v.repeat(repeat, 1)
    scores = q @ k.swapaxes(-1, -2)
    if mask is not None:
        scores = np.where(np.array(mask), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def random_heads(queries, keys, dtype=mx.float32):
    rng = np.random.default_rng(0)
    draw = lambda heads, length: mx.array(  # noqa: E731
        rng.normal(size=(1, heads, length, 16)).astype(np.float32)
    ).astype(dtype)
    return draw(6, queries), draw(2, keys), draw(2, keys)


@pytest.mark.parametrize("scores", [1 << 27, 600, 1])
def test_grouped_queries_equal_repeated_keys(monkeypatch, scores):
    monkeypatch.setattr(attention, "SCORES", scores)
    heads = random_heads(11, 40)
    mask = mx.array(np.tri(11, 40, 29, dtype=bool))
    for hidden in (None, mask):
        np.testing.assert_allclose(
            np.array(attend(heads[0], [heads[1:]], hidden)),
            plain(*heads, hidden),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("block", [1, 4, 512])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_blocks_of_queries_read_only_the_keys_they_see(monkeypatch, block, window):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    heads = random_heads(13, 30)
    mask = encoder_mask(20, 13, 3, 30, window)
    ours = attend_causal(heads[0], [heads[1:]], 20, window, None)
    np.testing.assert_allclose(np.array(ours), plain(*heads, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_hidden_scores_are_finite_numbers(dtype):
    """Minus infinity would make 0 * -inf = NaN further on."""
    heads = random_heads(5, 9, dtype)
    scores = attention._hide(mx.zeros((1, 2, 15, 9), dtype), mx.array(np.tri(5, 9, 4, dtype=bool)))
    assert mx.isfinite(scores).all().item()
    mask = mx.array(np.tri(5, 9, 4, dtype=bool))
    ours = np.array(attend(heads[0], [heads[1:]], mask).astype(mx.float32))
    assert np.abs(ours - plain(*heads, mask)).max() < 0.05


def test_a_long_context_in_chunks_of_keys(tmp_path, monkeypatch):
    """The merged chunks of a long context against one product, for one canvas and for three."""
    model = load_model(write_plain(tmp_path))
    cache = model.make_cache()
    model.prefill(np.arange(90)[None], cache)
    canvas = mx.array(np.random.default_rng(1).integers(0, 90, (1, 12)))
    whole = np.array(model.denoise(canvas, cache))
    monkeypatch.setattr(attention, "KEY_CHUNK", 10)
    for ours in (
        model.denoise(canvas, cache),
        model.denoise(mx.repeat(canvas, 3, axis=0), cache)[2:],
    ):
        assert np.abs(np.array(ours) - whole).max() < 3e-5 * np.abs(whole).max()


def test_a_long_context_takes_no_more_memory(monkeypatch):
    """Neither its chunks of keys nor the blocks of queries are under way all at once."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 128)
    monkeypatch.setattr(attention, "KEY_CHUNK", 256)
    queries, peaks = mx.random.normal((1, 2, 1024, 16)), []
    for count in (2_048, 16_384):
        pair = tuple(mx.random.normal((2, 1, 1, count, 16)))
        mx.eval(queries, pair)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attend_causal(queries, [pair], count - 1024, None, None))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.2 * peaks[0], peaks
    assert peaks[1] < 12 * 2 * 128 * 256 * 4 + 2 * 2 * queries.nbytes, peaks
