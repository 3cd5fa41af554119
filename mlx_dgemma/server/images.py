"""Images in requests: from the request itself or the public internet, read on threads of their own.

Whoever may ask this server must not reach through it: no file of this machine, no address
behind its router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.prompt.encode import prepare_prompt
from mlx_dgemma.prompt.media import PreparedPrompt
from mlx_dgemma.prompt.messages import IMAGE_PARTS, VIDEO_PARTS
from mlx_dgemma.server.engine import Engine
from mlx_dgemma.server.errors import ApiError

MAX_IMAGES = 64
# A slow host holds up other images at most, never the text of other requests.
_readers = ThreadPoolExecutor(2, thread_name_prefix="mlx_dgemma images")


def count_images(messages: list[Any]) -> int:
    """How many images the messages hold; ApiError 400 for too many, and for a video."""
    count = 0
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for j, part in enumerate(content if isinstance(content, list) else []):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in VIDEO_PARTS:
                where = f"messages[{i}].content[{j}]"
                raise ApiError(
                    400, f"{where} is a video: send some of its frames as images.", param=where
                )
            count += kind in IMAGE_PARTS
    if count > MAX_IMAGES:
        raise ApiError(
            400, f"The request has {count} images; {MAX_IMAGES} are the most.", param="messages"
        )
    return count


async def prepare_images(
    engine: Engine,
    messages: list[Any],
    image_tokens: int | None,
    keywords: Mapping[str, Any],
    hold: Callable[[int], None],
) -> PreparedPrompt:
    """The messages encoded, their images read.

    keywords: tools and thinking. hold: counts the memory of the images.
    """
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
