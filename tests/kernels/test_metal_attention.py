"""The attention kernels in the emulator, against float64: chunks, windows, masks, shared keys."""

import mlx.core as mx
import numpy as np
import pytest
import references as ref
from harness import ADVERSARIAL, DTYPES, TOLERANCE, emulated, every_setting, skip

from mlx_dgemma.kernels.attention import metal

pytestmark = skip


def check(
    dtype,
    setting,
    *,
    counts,
    chunk,
    batch=1,
    heads=4,
    kv_heads=2,
    length=3,
    head_dim=16,
    masked=False,
    window=None,
):
    """Segments of `counts` keys, all but the last shared by the batch; the last keys of a buffer
    where there is a window; a causal mask with a window of its own where `masked`."""
    mx.random.seed(sum(counts) + head_dim)
    queries = (mx.random.normal((batch, heads, length, head_dim)) * head_dim**-0.25).astype(dtype)
    segments = []
    for number, count in enumerate(counts):
        rows = 1 if number < len(counts) - 1 or len(counts) == 1 else batch
        spare = 0 if window is None else max(0, count - window)
        shape = (rows, kv_heads, count, head_dim)
        pair = [(mx.random.normal(shape) * head_dim**-0.25).astype(dtype) for _ in range(2)]
        segments.append(tuple(part[:, :, spare:] for part in pair))
    total = sum(keys.shape[2] for keys, _ in segments)
    mask = None
    if masked:
        i, j = np.arange(length)[:, None] + total - length, np.arange(total)[None, :]
        mask = (j <= i) & (j > i - total // 2)
    with emulated(setting):
        found = metal(queries, segments, chunk=chunk, mask=None if mask is None else mx.array(mask))
    keys, values = (
        np.concatenate(
            [np.broadcast_to(ref.numpy(s[n]), (batch, *s[n].shape[1:])) for s in segments], axis=2
        )
        for n in (0, 1)
    )
    expected = ref.attention(ref.numpy(queries), keys, values, mask)
    error = np.abs(ref.numpy(found) - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[dtype], error


@every_setting
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_chunks_of_grouped_queries(dtype, setting):
    check(dtype, setting, counts=(70, 9), chunk=32, masked=True)


@pytest.mark.parametrize("setting", ADVERSARIAL)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1021])
def test_chunk_edges(count, setting):
    check(mx.float32, setting, counts=(count,), chunk=256, length=1)


@every_setting
def test_a_context_shared_by_a_batch(setting):
    check(mx.float32, setting, counts=(40, 5), chunk=16, batch=3, length=5)


@pytest.mark.parametrize("setting", ADVERSARIAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_is_a_slice_of_the_buffer(dtype, setting):
    check(dtype, setting, counts=(90,), chunk=64, window=33)


@pytest.mark.parametrize("setting", ADVERSARIAL)
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(256, 4, 2), (512, 8, 1)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_real_head_dims(head_dim, heads, kv_heads, dtype, setting):
    check(
        dtype, setting, counts=(300, 4), chunk=256,
        head_dim=head_dim, heads=heads, kv_heads=kv_heads, length=2, masked=True,
    )  # fmt: skip


@pytest.mark.parametrize("setting", ADVERSARIAL)
def test_a_mask_of_the_last_keys_begins_inside_a_chunk(setting):
    mx.random.seed(6)
    queries, keys, values = (mx.random.normal((1, 2, count, 16)) for count in (4, 41, 41))
    mask = np.tri(4, 7, 3, dtype=bool)
    with emulated(setting):
        found = metal(queries, [(keys, values)], chunk=16, mask=mx.array(mask))
    whole = np.concatenate([np.ones((4, 34), dtype=bool), mask], axis=1)
    expected = ref.attention(*map(ref.numpy, (queries, keys, values)), whole)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


def test_the_longest_chunk():
    check(mx.bfloat16, "in order", counts=(4096 + 7,), chunk=4096, heads=2, kv_heads=1, length=1)


def test_flat_attention_over_large_values_stays_finite_in_half_precision():
    """4,096 equal scores over values of 20: their plain sum would pass float16's 65,504."""
    queries, keys = mx.zeros((1, 1, 1, 8), mx.float16), mx.zeros((1, 1, 4096, 8), mx.float16)
    values = mx.full((1, 1, 4096, 8), 20.0, mx.float16)
    with emulated("in order"):
        found = metal(queries, [(keys, values)])
    np.testing.assert_allclose(np.array(found).astype(np.float64), 20.0, rtol=2e-3)
