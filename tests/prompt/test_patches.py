"""Pixels and positions exactly as transformers' Gemma4ImageProcessorPil makes them."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.prompt.patches import BUDGETS, ImageProcessor
from mlx_dgemma.prompt.pictures import Picture, open_picture
from tests.prompt.drawings import animation, photograph, saved, screenshot

GEMMA = ImageProcessor(patch_size=16, pooling=3, places=10_240)


@cache
def reference(budget=280, patch_size=16, pooling=3):
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    return Gemma4ImageProcessorPil(
        max_soft_tokens=budget, patch_size=patch_size, pooling_kernel_size=pooling
    )


def assert_equal_to_reference(source, budget=280, processor=GEMMA, picture=None):
    """source: what we are given; picture: what the reference is, where it needs another form."""
    theirs = reference(budget, processor.patch_size, processor.pooling)(
        source if picture is None else picture, return_tensors="np"
    )
    ours = processor.prepare(open_picture(source), budget)
    (soft_tokens,) = theirs["num_soft_tokens_per_image"]
    assert ours.soft_tokens == soft_tokens <= budget
    patches = ours.patches
    count = len(patches.pixels)
    assert count == soft_tokens * processor.pooling**2
    np.testing.assert_array_equal(patches.pixels, theirs["pixel_values"][0][:count])
    np.testing.assert_array_equal(patches.positions, theirs["image_position_ids"][0][:count])
    assert patches.pixels.dtype == np.float32
    assert (theirs["image_position_ids"][0][count:] == -1).all()  # the rest is padding
    return ours


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("size", [(97, 61), (640, 480), (1000, 70)])
def test_photographs_at_every_budget(budget, size):
    assert_equal_to_reference(photograph(*size), budget)


@pytest.mark.parametrize(
    "size",
    [(1, 1), (2, 1), (48, 48), (768, 768), (4000, 8), (5, 3000), (1, 900), (900, 1), (13, 840)],
)
def test_extreme_shapes(size):
    ours = assert_equal_to_reference(photograph(*size))
    assert (ours.width, ours.height) == size


def test_a_screenshot_takes_fewer_tokens_than_its_budget():
    ours = assert_equal_to_reference(screenshot(1920, 1080))
    assert ours.soft_tokens == 264


def test_a_small_image_is_scaled_up():
    assert assert_equal_to_reference(photograph(10, 10)).soft_tokens == 256


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA", "HSV"])
def test_colour_spaces(mode):
    image = photograph(90, 70).convert(mode)
    if image.getbands()[-1] == "A":
        image.putalpha(Image.fromarray(np.arange(90 * 70, dtype=np.uint8).reshape(70, 90)))
    assert_equal_to_reference(image, 70)


def test_a_transparent_palette():
    image = photograph(90, 70).quantize(16)
    image.info["transparency"] = 3
    white = assert_equal_to_reference(image, 70)
    image.info.pop("transparency")
    opaque = assert_equal_to_reference(image, 70)
    assert white.key != opaque.key


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_files(form, tmp_path):
    path = tmp_path / f"picture.{form.lower()}"
    path.write_bytes(saved(photograph(120, 80), form))
    ours = assert_equal_to_reference(path, 140, picture=Image.open(path))
    from_bytes = GEMMA.prepare(open_picture(path.read_bytes()), 140)
    assert from_bytes.key == ours.key
    assert (ours.name, from_bytes.name) == (path.name, "image")


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_an_animation_shows_its_first_frame(form):
    content = animation(form=form)
    ours = assert_equal_to_reference(content, 70, picture=Image.open(io.BytesIO(content)))
    assert ours.values.max() == 0  # the first of its frames is black


def test_arrays():
    pixels = np.asarray(photograph(60, 50))
    assert_equal_to_reference(pixels, 70)
    grey = pixels[..., :1]
    expected = assert_equal_to_reference(grey, 70)
    floats = open_picture(grey.astype(np.float32) / 255)
    assert GEMMA.prepare(floats, 70).key == expected.key


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    """On purpose unlike the reference, which turns them white."""
    deep = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(deep).save(path)
    for source in (path, path.read_bytes(), deep, Image.open(path)):
        grey = np.asarray(open_picture(source).image)
        np.testing.assert_array_equal(
            grey, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2)
        )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_to_files_bytes_and_images(orientation, tmp_path):
    """The reference applies it to files alone."""
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    photograph(50, 20).save(path, exif=exif)
    upright = load_image(str(path))
    assert upright.size == ((50, 20) if orientation < 5 else (20, 50))
    for source in (path, path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(open_picture(source).image, upright)


def test_other_patches_and_pooling():
    small = ImageProcessor(patch_size=8, pooling=2, places=256)
    assert assert_equal_to_reference(photograph(128, 128), 70, small).soft_tokens == 64
    odd = ImageProcessor(patch_size=4, pooling=3, places=1000)
    assert_equal_to_reference(photograph(77, 131), 140, odd)


def test_equal_content_has_equal_keys():
    image = photograph(60, 60)
    one, other = (GEMMA.prepare(Picture("a", image), 70) for _ in range(2))
    assert one.key == other.key < 0
    assert GEMMA.prepare(Picture("a", photograph(60, 60, 1)), 70).key != one.key


def test_budgets_and_shapes_that_are_not_possible():
    with pytest.raises(InputError, match="300 image tokens are not possible: choose 70"):
        GEMMA.prepare(open_picture(photograph(9, 9)), 300)
    narrow = ImageProcessor(patch_size=16, pooling=3, places=64)
    with pytest.raises(InputError, match="places for 64"):
        narrow.prepare(open_picture(photograph(2000, 9)), 70)


def test_everything_comes_from_the_checkpoint():
    config = ModelConfig.from_folder(CHECKPOINT)
    processor = ImageProcessor.from_config(config)
    assert processor.patch_size == config.vision.patch_size
    assert processor.pooling == config.vision.pooling_kernel_size
    assert processor.image_tokens in BUDGETS
    assert processor.frame_tokens == 70


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("image_processor", {"patch_size": 14}, "image_processor.patch_size"),
        ("image_processor", {"resample": 2}, "resample"),
        ("image_processor", {"max_soft_tokens": 100}, "max_soft_tokens"),
        ("video_processor", {"do_normalize": True, "image_std": [0.5] * 3}, "image_std"),
    ],
)
def test_a_processor_config_that_asks_for_something_else(section, values, words):
    from dataclasses import replace

    config = ModelConfig.from_folder(CHECKPOINT)
    with pytest.raises(CheckpointError, match=words):
        ImageProcessor.from_config(replace(config, processor={section: values}))


def test_the_published_processor_configs():
    folder = Path(__file__).parents[3] / "shared" / "assets" / "checkpoint-4bit"
    if not folder.is_dir():
        pytest.skip(f"the published checkpoint's files are not at {folder}")
    from dataclasses import replace

    from mlx_dgemma.files import read_json

    config = ModelConfig.from_folder(folder)
    for name in ("processor_config.json", "processor_config.hf.json"):
        processor = ImageProcessor.from_config(replace(config, processor=read_json(folder / name)))
        assert processor == ImageProcessor(16, 3, 10_240, 280, 70, 32)
