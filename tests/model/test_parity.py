"""Both passes against transformers and against mlx-vlm in float32, on random checkpoints."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_vlm_oracle import VlmReference
from random_checkpoint import FULL, SLIDING, Dims, write
from transformers_oracle import Reference, assert_close

from mlx_dgemma.checkpoint.weights import load_model

DIMS = Dims()
ORACLES = {"transformers": Reference, "mlx-vlm": VlmReference}


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request):
    return ORACLES[request.param]


@pytest.fixture(scope="module")
def reference(oracle, checkpoint):
    return oracle(checkpoint)


def draw(seed, count, vocabulary=DIMS.vocabulary - 5):
    return np.random.default_rng(seed).integers(0, vocabulary, (1, count))


def start(model, reference, ids, position=0, **options):
    """The same context in both; `position` is the first token's."""
    reference.reset(position)
    cache = model.make_cache()
    for layer in cache.layers:
        layer.reset(position, None)
    reference.prefill(ids)
    model.prefill(ids, cache, **options)
    return cache


# The window is 16 and the canvas 12: below, at and around the window, and far beyond it.
@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 28, 100])
def test_denoise_after_prompts_around_the_window(model, reference, length):
    cache = start(model, reference, draw(length, length))
    canvas = draw(1, DIMS.canvas)
    assert_close(model.denoise(mx.array(canvas), cache), reference.denoise(canvas))
    # Beyond what rounding moves: near ties could be decided in two ways.
    assert reference.smallest_router_gap > 3e-6


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunks_of_the_prompt(model, reference, chunk_size):
    cache = start(model, reference, draw(3, 90), chunk_size=chunk_size)
    canvas = draw(4, DIMS.canvas)
    assert_close(model.denoise(mx.array(canvas), cache), reference.denoise(canvas))


def test_self_conditioning(model, reference):
    cache = start(model, reference, draw(5, 30))
    canvas, logits = draw(6, DIMS.canvas), None
    for step, temperature in enumerate((0.8, 0.6, 0.4)):
        expected = reference.denoise(canvas, logits)
        given_logits = None if logits is None else mx.array(logits)
        assert_close(model.denoise(mx.array(canvas), cache, given_logits), expected)
        logits, canvas = expected / temperature, draw(7 + step, DIMS.canvas)


def test_blocks_are_committed_and_denoised_again(model, reference):
    cache = start(model, reference, draw(8, 10))
    for block in range(4):
        canvas = draw(20 + block, DIMS.canvas)
        first = reference.denoise(canvas)
        assert_close(model.denoise(mx.array(canvas), cache), first)
        second = reference.denoise(canvas, first / 0.7)
        assert_close(model.denoise(mx.array(canvas), cache, mx.array(first / 0.7)), second)
        committed = second.argmax(-1)
        reference.prefill(committed)
        model.prefill(committed, cache)
    assert cache.offset == 10 + 4 * DIMS.canvas


@pytest.mark.parametrize("position", [200_000, 200_001, 262_000])
def test_positions_beyond_two_hundred_thousand(model, oracle, checkpoint, position):
    """The context starts at `position`, as if all before it had been seen and forgotten."""
    reference = oracle(checkpoint)
    if oracle is VlmReference:
        reference.align_sliding_rope()  # the next test says why
    cache = start(model, reference, draw(9, 40), position)
    assert cache.offset == position + 40
    canvas = draw(10, DIMS.canvas)
    assert_close(model.denoise(mx.array(canvas), cache), reference.denoise(canvas))


def test_mlx_vlm_itself_leaves_transformers_at_far_positions(checkpoint):
    """Its sliding layers' frequencies have other last bits, which 200,000 multiplies.

    Nothing else does: with the same frequencies the two agree, and near the start they do anyway.
    """
    reference, other = Reference(checkpoint), VlmReference(checkpoint)
    ids, canvas = draw(9, 40), draw(10, DIMS.canvas)

    def deviation(position):
        for one in (reference, other):
            one.reset(position)
            one.prefill(ids)
        expected, found = reference.denoise(canvas), other.denoise(canvas)
        return np.abs(found - expected).max() / np.abs(expected).max()

    assert deviation(0) < 1e-4
    assert deviation(200_000) > 1e-3
    other.align_sliding_rope()
    assert deviation(200_000) < 1e-4


def test_a_prepared_model_equals_the_published_tree(checkpoint, model):
    """lazy=True keeps the published parameters; joining them must change nothing."""
    lazy = load_model(checkpoint, lazy=True)
    ids, canvas = draw(11, 50), mx.array(draw(12, DIMS.canvas))
    outputs = []
    for candidate in (lazy, model):
        cache = candidate.make_cache()
        candidate.prefill(ids, cache)
        logits = candidate.denoise(canvas, cache)
        outputs.append(np.array(candidate.denoise(canvas, cache, logits / 0.8)))
    assert_close(outputs[0], outputs[1], 1e-5)
    # Each number once: what was joined is no longer there by itself.
    sizes = [sum(x.size for _, x in tree_flatten(one.parameters())) for one in (lazy, model)]
    assert sizes[0] == sizes[1]
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert any("qkv_proj" in name for name in names)
    assert not any("decoder" in name and "mlp.gate_proj" in name for name in names)


def test_the_saved_dialect_is_the_same_model(tmp_path, reference, model):
    saved = load_model(write(tmp_path, dialect="saved"))
    assert saved.config.text == model.config.text
    cache = start(saved, reference, draw(13, 33))
    canvas = draw(14, DIMS.canvas)
    assert_close(saved.denoise(mx.array(canvas), cache), reference.denoise(canvas))


def test_near_ties_in_the_router(tmp_path, oracle):
    """Pairs of experts score about 1e-3 apart and top_k is odd: every choice cuts a pair."""
    folder = write(tmp_path, seed=3, router_gap=1e-3)
    reference, model = oracle(folder), load_model(folder)
    cache = start(model, reference, draw(104, 40))
    canvas = draw(16, DIMS.canvas)
    assert_close(model.denoise(mx.array(canvas), cache), reference.denoise(canvas))
    gaps = np.concatenate(reference.router_gaps)
    assert np.median(gaps) < 2e-2
    assert gaps.min() > 1e-5


@pytest.mark.parametrize("rows", [2, 5])
def test_every_row_of_a_batch_is_what_it_is_alone(model, reference, rows):
    cache = start(model, reference, draw(17, 40))
    canvases = np.concatenate([draw(30 + row, DIMS.canvas) for row in range(rows)])
    logits = np.concatenate([reference.denoise(canvas[None]) for canvas in canvases])
    together = np.array(model.denoise(mx.array(canvases), cache))
    assert_close(together, logits)
    conditioned = model.denoise(mx.array(canvases), cache, mx.array(logits / 0.8))
    for row, canvas in enumerate(canvases):
        alone = model.denoise(mx.array(canvas[None]), cache)
        assert_close(together[row : row + 1], np.array(alone), 3e-5)
        expected = reference.denoise(canvas[None], logits[row : row + 1] / 0.8)
        assert_close(np.array(conditioned)[row : row + 1], expected)


def test_a_canvas_without_any_context(model):
    """transformers' cache cannot be empty; a lone canvas must equal a batch of it."""
    canvas = draw(18, DIMS.canvas)
    alone = np.array(model.denoise(mx.array(canvas), model.make_cache()))
    twice = np.array(model.denoise(mx.array(np.repeat(canvas, 2, 0)), model.make_cache()))
    assert np.isfinite(alone).all()
    assert_close(twice[:1], alone, 1e-5)


# transformers wants both layer kinds, of different shapes, the last one full.
SIZES = st.builds(
    lambda group, kv, full_kv, head, wider, top_k, experts, middle, **rest: Dims(
        heads=group * kv * full_kv,
        kv_heads=kv,
        full_kv_heads=full_kv,
        head_dim=2 * head,
        full_head_dim=2 * (head + wider),
        experts=experts,
        top_k=min(top_k, experts),
        layers=(SLIDING, *middle, FULL),
        **rest,
    ),
    group=st.integers(1, 2),
    kv=st.integers(1, 3),
    full_kv=st.integers(1, 2),
    head=st.integers(2, 9),
    wider=st.integers(1, 9),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    vocabulary=st.integers(20, 150),
    hidden=st.integers(5, 70),
    dense=st.integers(3, 60),
    expert_width=st.integers(3, 40),
    middle=st.lists(st.sampled_from([SLIDING, FULL]), max_size=2),
    window=st.integers(2, 20),  # the reference keeps everything with a window of 1
    partial=st.sampled_from([0.25, 0.5, 1.0]),
    canvas=st.integers(1, 20),
)


@settings(
    max_examples=8,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking a pair of networks takes minutes
)
@given(dims=SIZES, length=st.integers(1, 50), chunk=st.integers(1, 60), seed=st.integers(0, 99))
def test_any_dimensions(tmp_path_factory, oracle, dims, length, chunk, seed):
    folder = write(tmp_path_factory.mktemp("sizes"), dims, seed)
    reference, model = oracle(folder), load_model(folder)
    vocabulary = dims.vocabulary - 5
    cache = start(model, reference, draw(seed, length, vocabulary), chunk_size=chunk)
    canvas = draw(seed + 1, dims.canvas, vocabulary)
    expected = reference.denoise(canvas)
    assert_close(model.denoise(mx.array(canvas), cache), expected)
    reference.prefill(canvas)
    model.prefill(canvas, cache, chunk_size=chunk)
    again = reference.denoise(canvas, expected)
    assert_close(model.denoise(mx.array(canvas), cache, mx.array(expected)), again)
