"""The vision tower, and prompts with images, against transformers."""

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import Dims, write
from transformers_oracle import Reference, assert_close

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.model import ImagePatches

DIMS = Dims()
IMAGE = DIMS.image_token


def image(columns, rows, seed=0):
    """Random pixels of columns x rows patches of 4 by 4."""
    places = np.array([(x, y) for y in range(rows) for x in range(columns)])
    pixels = np.random.default_rng(seed).uniform(0, 1, (len(places), 48)).astype(np.float32)
    return ImagePatches(pixels, places)


def padded(images):
    """The batch as a processor hands it over: padded to the largest image."""
    most = max(len(one.positions) for one in images)
    pixels = np.zeros((len(images), most, 48), np.float32)
    positions = np.full((len(images), most, 2), -1)
    for row, one in enumerate(images):
        pixels[row, : len(one.positions)] = one.pixels
        positions[row, : len(one.positions)] = one.positions
    return pixels, positions


def prompt(*counts, lead=9, between=5, tail=11, seed=0):
    """Text, then a run of image tokens per count, text between and after."""
    rng = np.random.default_rng(seed)
    text = lambda n: rng.integers(0, IMAGE, n)  # noqa: E731
    parts = [text(lead)]
    for count in counts:
        parts += [np.full(count, IMAGE), text(between)]
    return np.concatenate([*parts, text(tail)])[None]


@pytest.mark.parametrize(("standardize", "clipped"), [(True, False), (False, True)])
@pytest.mark.parametrize("dialect", ["published", "saved"])
def test_the_tower(tmp_path, standardize, clipped, dialect):
    dims = DIMS.with_(standardize=standardize, clipped=clipped)
    folder = write(tmp_path, dims, dialect=dialect)
    images = [image(6, 6), image(12, 3, seed=1), image(3, 9, seed=2)]
    expected = Reference(folder).image_features(*padded(images))
    model = load_model(folder)
    ours = mx.concatenate([model.image_features(one) for one in images])
    assert_close(ours, expected)
    pixels, positions = padded(images)
    again = model.image_features(ImagePatches(pixels[2], positions[2]))  # padding is dropped
    np.testing.assert_array_equal(np.array(again), np.array(model.image_features(images[2])))


# 20 soft tokens exceed the window of 16, so the block must look past it; 4 do not.
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_prompts_with_images(model, reference, chunk_size):
    images = [image(15, 12), image(6, 6, seed=1)]
    ids = prompt(20, 4)
    reference.reset()
    reference.prefill_with_images(ids, *padded(images))
    cache = model.make_cache()
    model.prefill(ids, cache, images=images, chunk_size=chunk_size)
    canvas = np.random.default_rng(1).integers(0, IMAGE, (1, DIMS.canvas))
    expected = reference.denoise(canvas)
    assert_close(model.denoise(mx.array(canvas), cache), expected)

    # The image matters, and so do its blocks: causal attention alone is another result.
    causal = model.make_cache()
    features = [np.array(model.image_features(one)) for one in images]
    assert np.abs(features[0]).max() > 0
    model.config.text.__dict__["bidirectional_images"] = False
    try:
        model.prefill(ids, causal, images=images)
    finally:
        model.config.text.__dict__["bidirectional_images"] = True
    wrong = np.array(model.denoise(mx.array(canvas), causal))
    assert np.abs(wrong - expected).max() > 1e-2


def test_a_second_turn_with_an_image(model, reference):
    """An image after an existing context: the cached keys are no part of its block."""
    images = [image(15, 12), image(12, 3, seed=1)]
    first, second = prompt(20), prompt(4, seed=1)
    reference.reset()
    reference.prefill_with_images(first, *padded(images[:1]))
    reference.prefill_with_images(second, *padded(images[1:]))
    cache = model.make_cache()
    model.prefill(first, cache, images=images[:1])
    model.prefill(second, cache, images=images[1:])
    canvas = np.random.default_rng(2).integers(0, IMAGE, (1, DIMS.canvas))
    assert_close(model.denoise(mx.array(canvas), cache), reference.denoise(canvas))


def test_images_that_do_not_fit_the_prompt(model):
    with pytest.raises(InputError, match="1 image placeholders for 2 images"):
        model.prefill(prompt(4), model.make_cache(), images=[image(6, 6), image(6, 6)])
    with pytest.raises(InputError, match="gives 4 soft tokens, but the prompt has 5"):
        model.prefill(prompt(5), model.make_cache(), images=[image(6, 6)])
    with pytest.raises(InputError, match="whole number of 3 by 3"):
        model.image_features(image(5, 3))


def test_a_model_without_a_tower(tmp_path):
    from plain_checkpoint import write_plain

    blind = load_model(write_plain(tmp_path))
    with pytest.raises(CheckpointError, match="no vision tower"):
        blind.prefill(prompt(4), blind.make_cache(), images=[image(6, 6)])
