"""Images and videos that a command line names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.media import Medium
from mlx_dgemma.prompt.patches import BUDGETS
from mlx_dgemma.prompt.pictures import open_picture, read_source

STANDARD_INPUT = "standard input"
IMAGE_TOKENS = 280  # a guess at what an image takes, for the memory plan
VIDEO_TOKENS = 32 * 70


def add_media(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE_OR_URL",
        help="show the model a picture before the prompt ('-' reads stdin; repeatable)",
    )
    group.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE_OR_URL",
        help="show it frames of a GIF or WebP, or of a video (which needs the video extra)",
    )
    group.add_argument(
        "--image-tokens",
        type=int,
        choices=BUDGETS,
        metavar="N",
        help="the most soft tokens an image may take: "
        f"{', '.join(map(str, BUDGETS))} (default: the checkpoint's)",
    )


def parts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The message parts of every --image, read, and of every --video, found.

    Raises InputError before anything slow for what is missing or no picture.
    """
    if arguments.image.count("-") > 1 or ("-" in arguments.image and arguments.prompt == "-"):
        raise InputError("Standard input can be read once: give the other by its file.")
    found: list[dict[str, Any]] = []
    for source in arguments.image:
        from_stdin = source == "-"
        content = sys.stdin.buffer.read() if from_stdin else source
        picture = open_picture(content, name=STANDARD_INPUT if from_stdin else None)
        found.append({"type": "image", "image": picture})
    for source in arguments.video:
        if "://" not in source[:16]:
            read_source(source)
        found.append({"type": "video", "video": source})
    return found


def guessed_tokens(arguments: argparse.Namespace) -> int:
    """About what the images will take of the context."""
    images = len(arguments.image) * (arguments.image_tokens or IMAGE_TOKENS)
    return images + len(arguments.video) * VIDEO_TOKENS


def message(media: Sequence[dict[str, Any]], text: str) -> dict[str, Any]:
    """A user's message: what she shows, then what she says."""
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def records(media: Sequence[Medium]) -> list[dict[str, Any]]:
    """The JSON form of a summary's list."""
    return [
        {
            "name": medium.name,
            "width": medium.width,
            "height": medium.height,
            **({"frames": medium.frames} if medium.frames else {}),
            "soft_tokens": medium.soft_tokens,
        }
        for medium in media
    ]
