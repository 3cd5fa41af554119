"""The context cache: exact at every chunk boundary, after trims, restores, saves and growth."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from plain_checkpoint import write_plain

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.errors import CheckpointError, InputError, ResourceError
from mlx_dgemma.model import ContextCache
from mlx_dgemma.model.layer_context import LayerContext

CANVAS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_plain(tmp_path_factory.mktemp("plain")))


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 90, (1, count))


def prefilled(model, tokens, **options):
    cache = model.make_cache()
    model.prefill(tokens, cache, **options)
    return cache


def logits(model, cache, seed=99):
    return np.array(model.denoise(mx.array(ids(CANVAS, seed)), cache))


def assert_same(actual, expected, tolerance=1e-5):
    assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 80])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 79])
def test_chunked_prefill_equals_one_pass(model, length, chunk_size):
    tokens = ids(length)
    whole = logits(model, prefilled(model, tokens, chunk_size=1000))
    assert_same(logits(model, prefilled(model, tokens, chunk_size=chunk_size)), whole)


def test_every_split_in_two(model):
    """A boundary at every place around the window, a one-token remainder included."""
    tokens = ids(40)
    whole = logits(model, prefilled(model, tokens, chunk_size=1000))
    for cut in (1, 3, 14, 15, 16, 17, 28, 29, 39):
        cache = prefilled(model, tokens[:, :cut])
        model.prefill(tokens[:, cut:], cache)
        assert cache.offset == 40
        assert_same(logits(model, cache), whole)


def test_chunks_end_on_an_absolute_grid(model, monkeypatch):
    """A continued context is cut where a fresh one is, so that its keys are the same bits."""
    seen = []
    encode = type(model).through_encoder

    def watch(self, x, cache, blocks, **options):
        seen.append((cache.offset, x.shape[1]))
        return encode(self, x, cache, blocks, **options)

    monkeypatch.setattr(type(model), "through_encoder", watch)
    cache = prefilled(model, ids(10), chunk_size=8)
    model.prefill(ids(9), cache, chunk_size=8)
    assert seen == [(0, 8), (8, 2), (10, 6), (16, 3)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([[1, 2], [3, 4]], r"one prompt, \[S\] or \[1, S\], not int64 \[2, 2\]"),
        ([1.5], "not float64"),
        ([3, -1], "between 0 and"),
        ([2**40 + 5], "between 0 and"),
    ],
)
def test_ids_that_are_no_prompt_are_refused(model, wrong, words):
    cache = prefilled(model, ids(5))
    with pytest.raises(InputError, match=words):
        model.prefill(wrong, cache)
    assert cache.offset == 5


def test_denoising_commits_nothing(model):
    cache = prefilled(model, ids(30))
    before = logits(model, cache)
    for seed in range(3):
        logits(model, cache, seed)
    assert cache.offset == 30
    np.testing.assert_array_equal(logits(model, cache), before)


def test_snapshots_go_back_any_distance(model):
    cache = prefilled(model, ids(50))
    moment = cache.snapshot()
    expected = logits(model, cache)
    for block in range(6):
        model.prefill(ids(CANVAS, block), cache)
    assert cache.offset == 50 + 6 * CANVAS
    cache.restore(moment)
    assert cache.offset == 50
    np.testing.assert_array_equal(logits(model, cache), expected)
    model.prefill(ids(CANVAS, 7), cache)
    joined = np.concatenate([ids(50), ids(CANVAS, 7)], axis=1)
    assert_same(logits(model, cache), logits(model, prefilled(model, joined)))


def test_a_snapshot_whose_tokens_are_gone_is_refused(model):
    cache = prefilled(model, ids(19))
    earliest = cache.snapshot()
    model.prefill(ids(1), cache)
    early = cache.snapshot()
    model.prefill(ids(CANVAS, 1), cache)
    late = cache.snapshot()
    cache.restore(early)
    with pytest.raises(InputError, match="taken back since"):
        cache.restore(late)
    other = prefilled(model, ids(20))
    with pytest.raises(InputError, match="not of this context"):
        other.restore(early)
    cache.restore(earliest)
    with pytest.raises(InputError, match="taken back since"):
        cache.restore(early)


def test_a_snapshot_lives_as_long_as_its_owner(model):
    """A long chat takes one per turn, each with a copy of every sliding window."""
    cache = prefilled(model, ids(20))
    moment = weakref.ref(cache.snapshot())
    gc.collect()
    assert moment() is None


def test_a_snapshot_of_nothing(model):
    cache = model.make_cache()
    empty = cache.snapshot()
    expected = logits(model, cache)
    model.prefill(ids(40), cache)
    cache.restore(empty)
    assert cache.offset == 0
    np.testing.assert_array_equal(logits(model, cache), expected)


def test_a_context_that_was_emptied_again(model, tmp_path):
    """Its buffers are there, and nothing counts in them."""
    cache = model.make_cache()
    nothing = cache.snapshot()
    model.prefill(ids(9), cache)
    cache.restore(nothing)
    moment, frozen = cache.snapshot(), cache.freeze()
    cache.save(tmp_path / "emptied")
    expected = logits(model, model.make_cache())
    model.prefill(ids(5), cache)
    cache.restore(moment)
    other = prefilled(model, ids(3))
    other.copy_in(frozen)
    for emptied in (cache, other, ContextCache.load(tmp_path / "emptied", model)):
        assert emptied.offset == 0
        np.testing.assert_array_equal(logits(model, emptied), expected)


def test_save_and_load(model, tmp_path):
    cache = prefilled(model, ids(70))
    cache.metadata["ids"] = "[1, 2]"
    path = tmp_path / "conversation.cache"
    cache.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["conversation.cache"]
    again = ContextCache.load(path, model)
    assert (again.offset, again.metadata) == (70, {"ids": "[1, 2]"})
    np.testing.assert_array_equal(logits(model, again), logits(model, cache))
    model.prefill(ids(CANVAS, 3), again)
    model.prefill(ids(CANVAS, 3), cache)
    np.testing.assert_array_equal(logits(model, again), logits(model, cache))


def test_save_and_load_of_an_empty_context(model, tmp_path):
    model.make_cache().save(tmp_path / "empty")
    assert ContextCache.load(tmp_path / "empty", model).offset == 0


def test_files_that_are_no_context_of_this_model(model, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"nothing like it")
    with pytest.raises(CheckpointError, match="no safetensors file; delete it and prefill again"):
        ContextCache.load(path, model)
    with pytest.raises(CheckpointError, match="No such file or directory"):
        ContextCache.load(tmp_path / "absent", model)
    mx.save_safetensors(str(path), {"x": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="not a context saved by this version of the program"):
        ContextCache.load(path, model)
    prefilled(model, ids(9)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        ContextCache.load(path, model)

    path.write_bytes(whole)
    other = load_model(write_plain(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match="another model"):
        ContextCache.load(path, other)


@pytest.mark.parametrize("value", [None, "x", "[]", "-1", "null", "[1]"])
@pytest.mark.parametrize("key", ["bases", "offset", "metadata", "fingerprint"])
def test_a_damaged_header_is_named(key, value, model, tmp_path):
    path = tmp_path / "file.safetensors"
    prefilled(model, ids(9)).save(path)
    tensors, header = mx.load(str(path), return_metadata=True)
    header = {name: text for name, text in header.items() if name != key}
    mx.save_safetensors(str(path), tensors, header if value is None else {**header, key: value})
    with pytest.raises(CheckpointError, match=r"damaged|incomplete|another model"):
        ContextCache.load(path, model)


def test_tensors_of_another_shape_are_named(model, tmp_path):
    path = tmp_path / "file.safetensors"
    prefilled(model, ids(9)).save(path)
    tensors, header = mx.load(str(path), return_metadata=True)
    tensors = {name: tensor.T for name, tensor in tensors.items()}
    mx.save_safetensors(str(path), tensors, header)
    with pytest.raises(CheckpointError, match="does not hold what was saved"):
        ContextCache.load(path, model)


def test_every_text_weight_tells_models_apart(tmp_path):
    """An adapter of one projection changes what a context should hold, and nothing else."""
    model = load_model(write_plain(tmp_path))
    text = (model.model.decoder, model.model.encoder.language_model)
    tensors = [each for part in text for each in tree_flatten(part.parameters())]
    original = model.fingerprint()
    for name, tensor in tensors:
        kept, rows = mx.array(tensor), tensor.shape[0]
        tensor[rows // 3 : -(-rows * 2 // 3)] += 0.25
        del model._fingerprint
        assert model.fingerprint() != original, name
        tensor[:] = kept
    del model._fingerprint
    assert model.fingerprint() == original
    assert len(tensors) > 40


def test_save_where_it_cannot(model, tmp_path):
    with pytest.raises(ResourceError, match="cannot be saved"):
        prefilled(model, ids(9)).save(tmp_path / "no" / "such" / "folder")


def test_save_on_a_full_disk(model, tmp_path, monkeypatch):
    def write(*_):
        raise RuntimeError("[write] Unable to write 8 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", write)
    with pytest.raises(ResourceError, match="the disk is probably full"):
        prefilled(model, ids(9)).save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_buffers_grow_by_steps_and_sliding_ones_stay_small(model):
    cache = prefilled(model, ids(700), chunk_size=128)
    sliding, _, full = cache.layers
    assert sliding.capacity <= 512
    assert full.capacity == 768
    assert cache.nbytes == sum(2 * layer.buffers[0].nbytes for layer in cache.layers)
    for block in range(6):
        model.prefill(ids(CANVAS, block), cache)
        logits(model, cache)
    assert sliding.capacity <= 512
    assert full.capacity == 1024  # 772 tokens, a canvas, and an eighth to spare
    assert_same(
        logits(model, cache),
        logits(
            model,
            prefilled(model, np.concatenate([ids(700), *(ids(CANVAS, b) for b in range(6))], 1)),
        ),
    )


def test_a_canvas_is_written_in_place():
    """Behind 20,000 cached positions a canvas costs its own bytes, not a copy of the buffer."""
    layer = LayerContext(None, CANVAS)
    layer.reset(0, (mx.ones((1, 2, 20_000, 16)), mx.ones((1, 2, 20_000, 16))))
    mx.eval(layer.buffers)
    rows = mx.ones((1, 2, CANVAS, 16))
    mx.eval(rows)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(3):
        ((keys, values),) = layer.with_canvas(rows, rows)
        mx.eval(keys[:, :, -1].sum(), values[:, :, -1].sum())
    assert keys.shape[2] == 20_000 + CANVAS
    assert mx.get_peak_memory() - before < layer.buffers[0].nbytes / 10


def test_a_canvas_longer_than_the_configured_one(model):
    cache = prefilled(model, ids(250))
    canvas = ids(40, 3)
    wide = np.array(model.denoise(mx.array(canvas), cache))
    pair = np.array(model.denoise(mx.array(np.repeat(canvas, 2, 0)), cache))
    assert_same(pair[:1], wide, 3e-5)


def test_ids_outside_the_vocabulary(model):
    with pytest.raises(InputError, match="between 0 and 96"):
        model.prefill(np.array([[3, 97]]), model.make_cache())


def test_an_announced_prompt_is_given_its_room_once(model):
    cache = model.make_cache()
    cache.expect(3000)
    full = next(layer for layer in cache.layers if layer.window is None)
    capacities = set()
    for start in range(0, 3000, 500):
        model.prefill(np.arange(start, start + 500)[None] % 90, cache)
        capacities.add(full.capacity)
    assert capacities == {-(-(3000 + CANVAS) // 256) * 256}
    model.prefill(np.arange(500)[None] % 90, cache)  # not announced
    assert full.offset == 3500 <= full.capacity <= 3500 + CANVAS + 3000 // 8 + 256
