"""From the picture file to logits: transformers' and mlx-vlm's whole path against ours.

A random checkpoint with the demo's tokenizer and chat template, so that messages can be asked.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from random_checkpoint import Dims, write
from transformers_oracle import Reference, assert_close

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.generate import prepare_prompt
from tests.prompt.drawings import photograph, screenshot

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
IDS = ("image_token_id", "boi_token_id", "eoi_token_id")
PATCH, POOLING, BUDGET = 4, 3, 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    demo = json.loads((CHECKPOINT / "config.json").read_text())
    folder = write(
        tmp_path_factory.mktemp("pictures"), Dims(vocabulary=demo["text_config"]["vocab_size"])
    )
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {name: demo[name] for name in IDS}
    config["vision_config"]["default_output_length"] = BUDGET  # mlx-vlm pads to it
    path.write_text(json.dumps(config))
    sizes = {"max_soft_tokens": BUDGET, "patch_size": PATCH, "pooling_kernel_size": POOLING}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": sizes}))
    for name in TOKENIZER:
        shutil.copy(CHECKPOINT / name, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    photograph(90, 70).save(folder / "photo.jpg")
    screenshot(300, 160).save(folder / "screen.png")
    photograph(20, 60, 1).quantize(16).save(folder / "palette.gif")
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


FRAMES = [photograph(64, 48, seed) for seed in range(4)]


def conversation(files):
    """Pictures before, between and after words, in two turns, and a video of two frames."""
    picture = lambda name: {"type": "image", "image": str(files / name)}  # noqa: E731
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    video = {"type": "video", "video": FRAMES, "num_frames": 2, "source_fps": 0.02}
    return [
        {"role": "user", "content": [picture("photo.jpg"), text("Sort "), picture("screen.png")]},
        {"role": "assistant", "content": "abc"},
        {"role": "user", "content": [text("Count from 3"), picture("palette.gif"), video]},
    ]


def reference_ids(folder, messages, counts):
    """The template, the placeholders and the tokenizer as transformers brings them.

    counts: soft tokens of every image, then of every frame of the one video.
    """
    from transformers import AutoTokenizer
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.video_utils import VideoMetadata

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    words = SimpleNamespace(
        boi_token="<|image>", eoi_token="<image|>", image_token="<|x|>", video_token="<|y|>"
    )
    images = {"num_soft_tokens_per_image": counts[:-1]}
    for index in range(len(counts) - 1):
        block = Gemma4Processor.replace_image_token(words, images, index)
        text = text.replace("<|image|>", block, 1)
    metadata = VideoMetadata(total_num_frames=4, fps=0.02, frames_indices=[0, 2])
    video = {"num_soft_tokens_per_video": counts[-1:], "video_metadata": [metadata]}
    text = text.replace("<|video|>", Gemma4Processor.replace_video_token(words, video, 0))
    text = text.replace("<|x|>", "<|image|>").replace("<|y|>", "<|video|>")
    return np.array([tokenizer(text, add_special_tokens=False)["input_ids"]])


def reference_pictures(names):
    """What transformers makes of the files and of the video's sampled frames."""
    from transformers.image_utils import load_image
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    processor = Gemma4ImageProcessorPil(
        max_soft_tokens=BUDGET, patch_size=PATCH, pooling_kernel_size=POOLING
    )
    files = [load_image(str(name)) for name in names]
    return processor([*files, FRAMES[0], FRAMES[2]], return_tensors="np")


def canvas_of(seed=0):
    return np.random.default_rng(seed).integers(0, 800, (1, Dims().canvas))


@pytest.fixture(scope="module")
def seen_by_reference(folder, reference, files):
    """(ids, logits) of transformers' whole path. Its network knows images alone, so the video's
    placeholders become an image's before it sees them."""
    names = [files / name for name in ("photo.jpg", "screen.png", "palette.gif")]
    pictures = reference_pictures(names)
    ids = reference_ids(folder, conversation(files), pictures["num_soft_tokens_per_image"][:-1])
    spelling = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    names_to_ids = {token["content"]: token["id"] for token in spelling}
    image, video = names_to_ids["<|image|>"], names_to_ids["<|video|>"]
    reference.reset()
    reference.prefill_with_images(
        np.where(ids == video, image, ids),
        pictures["pixel_values"],
        pictures["image_position_ids"].astype(np.int64),
    )
    return ids[0].tolist(), reference.denoise(canvas_of())


@pytest.mark.parametrize("chunk_size", [7, 2048])
def test_a_conversation_with_pictures(loaded, seen_by_reference, files, chunk_size):
    ids, logits = seen_by_reference
    model, tokenizer = loaded
    ours = prepare_prompt(model, tokenizer, conversation(files))
    assert ours.ids == ids
    cache = model.make_cache()
    network = ours.network_ids(model.config.image_token_id)
    model.prefill(network, cache, [image.patches for image in ours.images], chunk_size)
    assert_close(model.denoise(mx.array(canvas_of()), cache), logits)


def test_mlx_vlm_sees_the_same(folder, loaded, files):
    from mlx_vlm.models.gemma4.processing_gemma4 import Gemma4ImageProcessor
    from mlx_vlm_oracle import VlmReference

    model, tokenizer = loaded
    path = files / "screen.png"
    prompt = prepare_prompt(model, tokenizer, "What is this?", images=[path])
    processor = Gemma4ImageProcessor(
        max_soft_tokens=BUDGET, patch_size=PATCH, pooling_kernel_size=POOLING
    )
    data, counts = processor.preprocess([Image.open(path)])
    assert counts == [prompt.images[0].soft_tokens]
    other = VlmReference(folder, vision=True)
    other.prefill(np.array([prompt.ids]), data["pixel_values"])
    cache = model.make_cache()
    model.prefill(prompt.ids, cache, [prompt.images[0].patches])
    canvas = canvas_of(2)
    assert_close(model.denoise(mx.array(canvas), cache), other.denoise(canvas))
