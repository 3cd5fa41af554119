"""Messages with images and videos, against transformers' own processor."""

from __future__ import annotations

import base64
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.prompt.chat_template import encode_messages
from mlx_dgemma.prompt.encode import encode_prompt, prepare_prompt
from mlx_dgemma.prompt.media import PreparedPrompt, prepare_messages
from mlx_dgemma.prompt.patches import ImageProcessor
from mlx_dgemma.prompt.pictures import Access, open_picture
from tests.prompt.drawings import animation, photograph, saved

CONFIG = ModelConfig.from_folder(CHECKPOINT)
PHOTO = photograph(50, 40)
TEXT = {"type": "text", "text": "What is this?"}


def user(*content):
    return {"role": "user", "content": list(content)}


def image(source=PHOTO, key="image"):
    return {"type": "image", key: source}


def prepare(tokenizer, *messages, config=CONFIG, **options):
    return prepare_messages(tokenizer, config, list(messages), **options)


def expanded_by_reference(tokenizer, messages, counts, videos=(), **options):
    """The ids after transformers' processor has replaced the placeholders in the prompt's text."""
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.video_utils import VideoMetadata

    words = SimpleNamespace(
        boi_token="<|image>",
        eoi_token="<image|>",
        image_token="<|image|>",
        video_token="<|video|>",
    )
    text = tokenizer.decode(encode_messages(tokenizer, messages, **options))
    for index in range(len(counts)):
        block = Gemma4Processor.replace_image_token(
            words, {"num_soft_tokens_per_image": counts}, index
        )
        text = text.replace("<|image|>", block.replace("|image|", "|x|"), 1)
    for count, seconds in videos:
        metadata = VideoMetadata(total_num_frames=9, fps=1, frames_indices=seconds)
        block = Gemma4Processor.replace_video_token(
            words, {"num_soft_tokens_per_video": [count], "video_metadata": [metadata]}, 0
        )
        text = text.replace("<|video|>", block.replace("|video|", "|y|"), 1)
    text = text.replace("<|x|>", "<|image|>").replace("<|y|>", "<|video|>")
    return tokenizer.encode(text, special=True)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    user(TEXT, image(), {"type": "text", "text": "and this"}, image(photograph(90, 30))),
    {"role": "assistant", "content": "A dog and a cat."},
    user(image(photograph(30, 30, 1)), {"type": "text", "text": "And here?"}),
]


def test_images_in_several_turns(tokenizer):
    ours = prepare(tokenizer, *CONVERSATION)
    counts = [one.soft_tokens for one in ours.images]
    assert len(counts) == 3
    assert ours.ids == expanded_by_reference(tokenizer, CONVERSATION, counts)
    assert ours.ids.count(tokenizer.ids["image"]) == sum(counts)
    assert [medium.soft_tokens for medium in ours.media] == counts
    assert str(ours.media[0]) == f"image 50x40, {counts[0]} soft tokens"


def test_a_video_between_words(tokenizer):
    """The first time joins the words before it: they are tokenized together."""
    frames = [photograph(64, 48, seed) for seed in range(5)]
    video = {"type": "video", "video": frames, "num_frames": 3, "source_fps": 0.05}
    messages = [user({"type": "text", "text": "Look 1"}, video, image(), TEXT)]
    ours = prepare(tokenizer, *messages)
    count = ours.images[0].soft_tokens
    expected = expanded_by_reference(
        tokenizer, messages, [ours.images[3].soft_tokens], [(count, [0, 20, 60])]
    )
    assert ours.ids == expected
    assert len(ours.images) == 4
    assert ours.ids.count(tokenizer.ids["video"]) == 3 * count
    network = ours.network_ids(CONFIG.image_token_id)
    assert tokenizer.ids["video"] not in network
    assert len(network) == len(ours.ids)
    assert str(ours.media[0]) == f"video 64x48, 3 frames of {count} soft tokens"


def test_a_picture_in_a_tool_result(tokenizer):
    call = {"id": "c", "function": {"name": "look", "arguments": {}}}
    messages = [
        user(TEXT),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [image(), TEXT]},
    ]
    ours = prepare(tokenizer, *messages)
    assert ours.ids == expanded_by_reference(tokenizer, messages, [ours.images[0].soft_tokens])


def test_every_way_to_name_a_picture(demo, tmp_path):
    path = tmp_path / "dog.png"
    PHOTO.save(path)
    data = "data:image/png;base64," + base64.b64encode(saved(PHOTO)).decode()
    parts = [
        image(),
        image(path),
        image(str(path)),
        image(saved(PHOTO)),
        image(np.asarray(PHOTO)),
        image(data, "url"),
        image(path, "path"),
        {"type": "image_url", "image_url": {"url": data, "detail": "low"}},
        {"type": "input_image", "image_url": data},
        image(ImageProcessor.from_config(CONFIG).prepare(open_picture(PHOTO))),
    ]
    ours = prepare(demo, user(*parts, TEXT))
    assert len(ours.images) == len(parts)
    assert all(one is ours.images[0] for one in ours.images)  # equal pictures are one
    assert [medium.name for medium in ours.media[:3]] == ["image", "dog.png", "dog.png"]


def test_the_budget_of_images_and_frames(demo):
    video = {"type": "video", "video": animation(2)}
    wide = prepare(demo, user(image(photograph(400, 300)), video, TEXT), image_tokens=140)
    first, *frames = (one.soft_tokens for one in wide.images)
    assert 70 < first <= 140
    assert max(frames) <= 70


def test_keys_tell_pictures_apart(demo):
    same, other = photograph(60, 60, 1), photograph(60, 60, 2)
    one, again, two = (prepare(demo, user(image(p), TEXT)) for p in (same, same, other))
    assert one.ids == two.ids
    assert one.keys == again.keys != two.keys
    hidden = [key for key in one.keys if key < 0]
    assert len(hidden) == one.images[0].soft_tokens
    assert len(set(hidden)) == 1
    assert len(one.keys) == len(one.ids)
    start = one.keys.index(hidden[0])
    assert one.images_after(start) == one.images
    assert one.images_after(start + len(hidden)) == []


def test_images_beside_the_messages(demo):
    messages = [user({"type": "image"}, TEXT, {"type": "image"})]
    pictures = [photograph(50, 40), photograph(40, 50)]
    ours = prepare(demo, *messages, images=pictures)
    inside = prepare(demo, user(image(pictures[0]), TEXT, image(pictures[1])))
    assert ours.keys == inside.keys
    model = SimpleNamespace(config=CONFIG)
    before = prepare_prompt(model, demo, "What is this?", images=pictures[:1])
    assert before.keys == prepare(demo, user(image(pictures[0]), TEXT)).keys
    with pytest.raises(InputError, match="1 of the given images"):
        prepare(demo, *messages, images=[*pictures, PHOTO])
    with pytest.raises(InputError, match=r"content\[2\] has no image"):
        prepare(demo, *messages, images=pictures[:1])
    with pytest.raises(InputError, match="images is a list"):
        prepare_prompt(model, demo, "?", images="dog.png")


def test_ids_with_their_placeholders(demo):
    model = SimpleNamespace(config=CONFIG)
    ids = prepare(demo, user(image(), TEXT)).ids
    assert prepare_prompt(model, demo, ids, images=[PHOTO]).keys != ids
    with pytest.raises(InputError, match="runs of"):
        prepare_prompt(model, demo, ids[:-30], images=[PHOTO, PHOTO])
    prepared = PreparedPrompt([1, 2, 3])
    assert prepare_prompt(model, demo, prepared) is prepared
    assert encode_prompt(demo, prepared) == [1, 2, 3]
    assert prepared.keys == prepared.network_ids(9) == [1, 2, 3]


def test_words_cannot_forge_a_picture(demo):
    ours = prepare(demo, user({"type": "text", "text": "<|image|> <|image> <|video|>"}, image()))
    assert ours.ids.count(demo.ids["image"]) == ours.images[0].soft_tokens
    assert demo.ids["video"] not in ours.ids


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image"}, "has no image"),
        ({"type": "image", "image": 7}, "not 7"),
        ({"type": "video"}, "has no video"),
        ({"type": "video", "video": [PHOTO], "fps": 1, "num_frames": 2}, "keep one"),
        ({"type": "video", "video": [PHOTO], "fps": "1"}, "fps must be a number"),
        ({"type": "video", "video": [PHOTO], "num_frames": 0}, "one frame at least"),
        ({"type": "input_audio", "input_audio": {}}, "does not hear"),
    ],
)
def test_parts_that_cannot_be_read(demo, part, words):
    with pytest.raises(InputError, match=words):
        prepare(demo, user(part, TEXT))


def test_access_is_passed_on(demo, tmp_path):
    PHOTO.save(tmp_path / "a.png")
    with pytest.raises(InputError, match="not as a path"):
        prepare(demo, user(image(tmp_path / "a.png")), access=Access(files=False))


def test_more_images_than_the_context_holds(demo):
    config = replace(CONFIG, text=replace(CONFIG.text, max_position_embeddings=200))
    with pytest.raises(InputError, match="for 4 images, but only 168 fit"):
        prepare(demo, user(*[image(photograph(60, 60, i)) for i in range(4)]), config=config)


def test_a_model_without_a_vision_tower(demo):
    with pytest.raises(CheckpointError, match="no vision tower"):
        prepare(demo, user(image(), TEXT), config=replace(CONFIG, vision=None))


def test_a_template_that_leaves_pictures_out(demo):
    blind = SimpleNamespace(**vars(demo))
    for name in ("split_control", "control_id", "encode", "contains_control"):
        setattr(blind, name, getattr(demo, name))
    blind.spellings = demo.spellings
    blind.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(InputError, match="leaves out 1 of the images"):
        prepare(blind, user(image(), TEXT))
    blind.chat_template = "<|image|><|image|>"
    with pytest.raises(InputError, match="more images than were given"):
        prepare(blind, user(image(), TEXT))
