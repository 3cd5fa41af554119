"""Images in requests: from the request itself or the public internet, read on threads of their own.

Whoever may ask this server must not reach through it: no file of this machine, no address
behind its router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from mlx_dgemma.errors import CheckpointError, MediaError
from mlx_dgemma.prompt.encode import prepare_prompt
from mlx_dgemma.prompt.media import PreparedPrompt
from mlx_dgemma.prompt.messages import IMAGE_PARTS, VIDEO_PARTS
from mlx_dgemma.server.engine import Engine
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.history import newest_question

MAX_IMAGES = 64
_ATTEMPTS = 3  # to read a conversation, with fewer of its older images
# A slow host holds up other images at most, never the text of other requests.
_readers = ThreadPoolExecutor(2, thread_name_prefix="mlx_dgemma images")


def count_images(messages: list[Any]) -> int:
    """How many images the messages hold; ApiError 400 for a video."""
    count = 0
    for i, message in enumerate(messages):
        for j, part in enumerate(_parts(message)):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in VIDEO_PARTS:
                where = f"messages[{i}].content[{j}]"
                raise ApiError(
                    400, f"{where} is a video: send some of its frames as images.", param=where
                )
            count += kind in IMAGE_PARTS
    return count


async def prepare_images(
    engine: Engine,
    messages: list[Any],
    image_tokens: int | None,
    keywords: Mapping[str, Any],
    hold: Callable[[int], None],
) -> tuple[PreparedPrompt, list[str]]:
    """The messages encoded, their images read, and warnings of images that were left out.

    keywords: tools and thinking. hold: counts the memory of the images. An image of the newest
    question that cannot be read is refused; one elsewhere, which nobody could take back, is left
    out, and so are the oldest ones of too many.
    """
    newest = f"messages[{newest_question(messages)}]."
    old = [where for where in _images(messages) if not where.startswith(newest)]
    surplus = count_images(messages) - MAX_IMAGES
    if surplus > len(old):
        raise ApiError(
            400,
            f"The newest message has {surplus + MAX_IMAGES - len(old)} images; {MAX_IMAGES} are "
            "the most.",
            param="messages",
        )
    left_out = dict.fromkeys(old[: max(surplus, 0)], f"only {MAX_IMAGES} images are read")
    if engine.runtime.model.config.vision is None:
        left_out = dict.fromkeys(old, "this model has no vision tower")
    for attempt in range(_ATTEMPTS + 1):
        try:
            prompt = await _read(engine, _without(messages, left_out), image_tokens, keywords, hold)
            break
        except MediaError as error:
            if error.where not in old or attempt == _ATTEMPTS:
                raise
            # Each attempt reads every image again, so the last one leaves all old ones out.
            gone = old if attempt == _ATTEMPTS - 1 else [error.where]
            left_out |= {where: str(error) for where in gone if where not in left_out}
    return prompt, [f"the image at {where} was left out: {why}" for where, why in left_out.items()]


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, list) else []


def _images(messages: list[Any]) -> list[str]:
    """Where the images stand, in order."""
    return [
        f"messages[{i}].content[{j}]"
        for i, message in enumerate(messages)
        for j, part in enumerate(_parts(message))
        if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS
    ]


def _without(messages: list[Any], left_out: Collection[str]) -> list[Any]:
    """The messages with placeholders for some of their images."""
    gone = {"type": "text", "text": "[an image was left out]"}
    return [
        {**message, "content": [
            gone if f"messages[{i}].content[{j}]" in left_out else part
            for j, part in enumerate(_parts(message))
        ]} if _parts(message) else message
        for i, message in enumerate(messages)
    ]  # fmt: skip


async def _read(
    engine: Engine,
    messages: list[Any],
    image_tokens: int | None,
    keywords: Mapping[str, Any],
    hold: Callable[[int], None],
) -> PreparedPrompt:
    read = partial(
        prepare_prompt,
        engine.runtime.model,
        engine.tokenizer,
        messages,
        image_tokens=image_tokens,
        access=replace(engine.settings.image_access, hold=hold),
        **keywords,
    )
    try:
        return await asyncio.get_running_loop().run_in_executor(_readers, read)
    except CheckpointError as error:  # a model without a vision tower
        raise ApiError(400, str(error), param="messages") from error
