"""A context in 8 bits against the obvious one: the exact cache with its committed part rounded."""

import mlx.core as mx
import numpy as np
import pytest
from configs import FULL, SLIDING, config
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_checkpoint import write_plain

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.kernels.attention import attend
from mlx_dgemma.model import ContextCache, attention
from mlx_dgemma.model.layer_context import LayerContext
from mlx_dgemma.model.packed_context import PackedLayerContext, pack, unpack

CANVAS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers of three attend to all, the first in the encoder pass as well."""
    small = config(layer_types=[FULL, SLIDING, FULL], global_head_dim=64)
    return load_model(write_plain(tmp_path_factory.mktemp("plain"), small))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Contexts of these lengths are read in several pieces."""
    monkeypatch.setattr(attention, "KEY_CHUNK", 20)


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 90, (1, count))


def prefilled(model, tokens, kv_bits=8, **options):
    cache = model.make_cache(kv_bits)
    model.prefill(tokens, cache, **options)
    return cache


def logits(model, cache, seed=99, batch=1):
    return np.array(model.denoise(mx.array(ids(CANVAS * batch, seed).reshape(batch, -1)), cache))


def assert_same(actual, expected, tolerance=1e-5):
    assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()


def rounded(rows):
    return unpack(pack(rows), rows.dtype)


def check_and_round(exact, packed):
    """The exact cache gets what 8 bits keep of it, once that is seen to be so.

    It takes the other cache's codes: where a sum of another order lands on the far side of a
    rounding, its own could be one off.
    """
    for theirs, ours in zip(exact.layers, packed.layers, strict=True):
        if theirs.window is None:
            (segment,) = ours.visible()
            kept = segment.read(0, ours.used, mx.float32, None)
            base, arrays = theirs.tail()
            for rows, unpacked in zip(arrays, kept, strict=True):
                step = (rows.max(axis=-1) - rows.min(axis=-1)) / 255
                assert (mx.abs(rows - unpacked) <= 1.3 * step[..., None] + 1e-4).all().item()
            theirs.reset(base, kept)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_the_exact_context_with_its_committed_part_rounded(model, chunk_size, batch):
    """A chunk of the prompt and a canvas see themselves as they are."""
    tokens = ids(70)
    ours, theirs = model.make_cache(8), model.make_cache()
    parts = [tokens[:, at : at + chunk_size] for at in range(0, 70, chunk_size)]
    for part in [*parts, ids(CANVAS, 5)]:
        model.prefill(part, ours)
        model.prefill(part, theirs)
        check_and_round(theirs, ours)
    found = logits(model, ours, batch=batch)
    assert_same(found, logits(model, theirs, batch=batch))
    exact = prefilled(model, np.concatenate([*parts, ids(CANVAS, 5)], axis=1), None)
    assert np.abs(found - logits(model, exact, batch=batch)).max() > 1e-4  # rounded it is
    whole = prefilled(model, tokens, chunk_size=chunk_size)
    model.prefill(ids(CANVAS, 5), whole)  # `prefill` divides a prompt no otherwise
    np.testing.assert_array_equal(logits(model, whole, batch=batch), found)


def test_canvases_of_a_batch_see_what_each_sees_alone(model):
    cache = prefilled(model, ids(50))
    canvases = mx.array(ids(3 * CANVAS, 4).reshape(3, -1))
    together = np.array(model.denoise(canvases, cache))
    for row in range(3):
        assert_same(together[row], np.array(model.denoise(canvases[row : row + 1], cache))[0], 3e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_packed_keys_agrees_with_float64(chunk, batch, masked):
    mx.random.seed(chunk + batch)
    keys, values = mx.random.normal((2, 1, 2, 70, 32))
    own = mx.random.normal((2, batch, 2, 9, 32))
    queries = mx.random.normal((batch, 4, 9, 32)) * 0.3
    layer = PackedLayerContext(CANVAS)
    layer.append(keys, values)
    mask = mx.array(np.tri(9, dtype=bool)) if masked else None
    found = attend(queries, [*layer.visible(), (own[0], own[1])], chunk=chunk, mask=mask)

    k, v = (
        np.concatenate([np.repeat(np.array(rounded(a), np.float64), batch, 0), b], axis=2)
        for a, b in ((keys, np.array(own[0])), (values, np.array(own[1])))
    )
    scores = np.array(queries, np.float64) @ k.repeat(2, 1).swapaxes(-1, -2)
    if masked:
        scores[..., 70:][..., ~np.tri(9, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v.repeat(2, 1)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=6),
    st.sampled_from([mx.float32, mx.bfloat16]),
)
def test_a_position_is_packed_by_itself(moves, dtype):
    """Whatever chunks came, were taken back and came again: the stored bits are the position's."""
    rng = np.random.default_rng(len(moves))
    packed, exact = PackedLayerContext(CANVAS), LayerContext(None, CANVAS)
    for count, taken_back in moves:
        rows = [mx.array(rng.normal(size=(1, 2, count, 32))).astype(dtype) for _ in range(2)]
        for layer in (packed, exact):
            layer.append(*rows)
            layer.used -= min(taken_back, layer.used)
    _, arrays = exact.tail()
    if arrays is None:  # all was taken back
        assert packed.tail() == (0, None)
        return
    expected = [*pack(arrays[0]), *pack(arrays[1])]
    for ours, theirs in zip(packed.tail()[1], expected, strict=True):
        assert mx.array_equal(ours, theirs).item()
    (segment,) = packed.visible()
    keys, values = segment.read(0, packed.used, dtype, None)
    assert keys.dtype == dtype
    assert mx.array_equal(keys, rounded(arrays[0])).item()
    assert mx.array_equal(values, rounded(arrays[1])).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_eight_bits_are_eight_bits_in_every_dtype(dtype):
    """Even rounding errs by 0.29 of a step, a 255th of the group's range."""
    rows = (mx.random.normal((1, 1, 200, 64), key=mx.random.key(1)) * 20).astype(dtype)
    wide = rows.astype(mx.float32)
    step = (wide.max(axis=-1) - wide.min(axis=-1)) / 255
    error = (rounded(rows).astype(mx.float32) - wide) / step[..., None]
    assert mx.abs(error).max().item() < 1.3
    assert 0.28 < mx.sqrt((error * error).mean()).item() < 0.32


def test_snapshots(model):
    tokens = ids(60)
    cache = prefilled(model, tokens)
    moment, expected = cache.snapshot(), logits(model, cache)
    for block in range(4):
        model.prefill(ids(CANVAS, block), cache)
    cache.restore(moment)
    np.testing.assert_array_equal(logits(model, cache), expected)
    model.prefill(ids(CANVAS, 7), cache)
    other = prefilled(model, tokens)
    model.prefill(ids(CANVAS, 7), other)
    np.testing.assert_array_equal(logits(model, cache), logits(model, other))


def test_frozen_and_copied_in(model):
    cache = prefilled(model, ids(70))
    frozen, expected = cache.freeze(), logits(model, cache)
    assert frozen.nbytes < prefilled(model, ids(70), None).freeze().nbytes
    model.prefill(ids(CANVAS), cache)  # the frozen one keeps its own memory
    other = model.make_cache(8)
    other.copy_in(frozen)
    assert other.offset == 70
    np.testing.assert_array_equal(logits(model, other), expected)
    model.prefill(ids(CANVAS), other)
    np.testing.assert_array_equal(logits(model, other), logits(model, cache))
    with pytest.raises(InputError, match="frozen with kv_bits=8"):
        model.make_cache().copy_in(frozen)
    with pytest.raises(InputError, match="frozen with kv_bits=None"):
        other.copy_in(model.make_cache().freeze())


def test_saved_and_loaded(model, tmp_path):
    cache = prefilled(model, ids(70))
    cache.save(tmp_path / "packed")
    again = ContextCache.load(tmp_path / "packed", model, 8)
    assert (again.offset, again.kv_bits) == (70, 8)
    np.testing.assert_array_equal(logits(model, again), logits(model, cache))
    model.make_cache(8).save(tmp_path / "empty")
    assert ContextCache.load(tmp_path / "empty", model, 8).offset == 0


def test_a_file_of_the_other_kind_is_refused(model, tmp_path):
    prefilled(model, ids(20)).save(tmp_path / "packed")
    prefilled(model, ids(20), None).save(tmp_path / "exact")
    with pytest.raises(CheckpointError, match=r"an 8-bit context: read it with kv_bits=8"):
        ContextCache.load(tmp_path / "packed", model)
    with pytest.raises(CheckpointError, match=r"an exact context: read it without kv_bits=8"):
        ContextCache.load(tmp_path / "exact", model, 8)


def test_a_file_without_a_part_is_incomplete(model, tmp_path):
    path = tmp_path / "packed.safetensors"
    prefilled(model, ids(20)).save(path)
    tensors, header = mx.load(str(path), return_metadata=True)
    del tensors["layers.0.values.scales"]
    mx.save_safetensors(str(path), tensors, header)
    with pytest.raises(CheckpointError, match="does not hold what was saved"):
        ContextCache.load(path, model, 8)


def test_values_that_cannot_be(model, tmp_path):
    for bits in (4, 16, 0, "8"):
        with pytest.raises(InputError, match=f"kv_bits={bits!r} is not possible: use 8"):
            model.make_cache(bits)
    odd = load_model(write_plain(tmp_path, config(global_head_dim=40)))
    with pytest.raises(CheckpointError, match="this model's have 40; leave kv_bits out"):
        odd.prefill(ids(3), odd.make_cache(8))


def test_an_announced_prompt_is_given_its_room_once(model):
    cache = model.make_cache(8)
    cache.expect(900)
    capacities = set()
    for start in range(0, 900, 300):
        model.prefill(ids(300, start), cache)
        capacities.add(cache.layers[0].capacity)
    assert capacities == {-(-(900 + CANVAS) // 256) * 256}


def filled(count, chunk=512):
    """A layer of `count` chunks, one head 128 wide."""
    layer = PackedLayerContext(16)
    layer.expected = (count + 1) * chunk
    for number in range(count):
        layer.append(*mx.random.normal((2, 1, 1, chunk, 128), key=mx.random.key(number)))
        mx.eval(layer.buffers)
    return layer


def peak(work):
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("queries", [4, 32])
def test_reading_makes_one_chunk_whole_at_a_time(queries):
    """Eight times the context takes no more working memory, and no copy of it in floats."""
    few, many = filled(8), filled(64)
    own = mx.random.normal((1, 2, queries, 128))
    mx.eval(own)
    short, long = (
        peak(lambda layer=layer: attend(own, layer.visible(), chunk=512)) for layer in (few, many)
    )
    assert long < 1.3 * short
    assert long < 2 * 64 * 512 * 128 * 4 / 8


def test_a_commit_is_written_in_place():
    layer = filled(40)
    rows = mx.random.normal((2, 1, 1, 16, 128))
    mx.eval(rows)

    def commit():
        layer.append(*rows)
        return layer.buffers

    assert peak(commit) < sum(buffer.nbytes for buffer in layer.buffers) / 10


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_reading_a_prompt_takes_flat_memory(model, monkeypatch, kv_bits):
    """Of both kinds."""
    monkeypatch.setattr(attention, "KEY_CHUNK", 128)
    taken = []
    for count in (1_000, 4_000):
        cache = model.make_cache(kv_bits)
        cache.expect(count + 500)
        for index, layer in enumerate(cache.layers):
            text = model.config.text
            shape = (1, text.kv_heads_of(index), count, text.head_dim_of(index))
            layer.append(*mx.random.normal((2, *shape)))
        mx.eval(cache.arrays)
        taken.append(peak(lambda cache=cache: model.prefill(ids(200), cache) or cache.arrays))
    assert taken[1] < 1.1 * taken[0]


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_masks_do_not_reach_back_over_the_context(model, monkeypatch, kv_bits):
    """512 queries by 262,144 keys would be 134 MB."""
    widths = []

    def watch(*arguments, real=attention.encoder_mask):
        mask = real(*arguments)
        if mask is not None:
            widths.append(mask.shape[1])
        return mask

    monkeypatch.setattr(attention, "encoder_mask", watch)
    prefilled(model, ids(300), kv_bits, chunk_size=50)
    assert max(widths) <= 50 + 16  # a window's own mask reaches over the window
